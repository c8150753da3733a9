"""What to cite: the publications of the rules and trainers that a network uses, in BibTeX."""

from __future__ import annotations

from torch import nn

from tpext import _C
from tpext.feedback import FeedbackTrainer
from tpext.rules import Rule
from tpext.rules.base import not_an_instance

_PACKAGE = f"""@misc{{tpext,
  author = {{{{The tpext developers}}}},
  title = {{{{tpext: target propagation for PyTorch on fused CPU and CUDA kernels}}}},
  note = {{Version {_C.build_info()["version"]}}}
}}"""

_ENTRIES = {
    "bengio2014": """@misc{bengio2014,
  author = {Bengio, Y.},
  title = {{How Auto-Encoders Could Provide Credit Assignment in Deep Networks via Target Propagation}},
  year = {2014}
}""",
    "ernoult2022": """@inproceedings{ernoult2022,
  author = {Ernoult, M. and Normandin, F. and Moudgil, A. and Spinney, S. and Belilovsky, E. and Rish, I. and
            Richards, B. and Bengio, Y.},
  title = {{Towards Scaling Difference Target Propagation by Learning Backprop Targets}},
  booktitle = {International Conference on Machine Learning (ICML)},
  year = {2022}
}""",
    "lee2015": """@inproceedings{lee2015,
  author = {Lee, D.-H. and Zhang, S. and Fischer, A. and Bengio, Y.},
  title = {{Difference Target Propagation}},
  booktitle = {European Conference on Machine Learning and Knowledge Discovery in Databases (ECML-PKDD)},
  year = {2015}
}""",
    "manchev2020": """@article{manchev2020,
  author = {Manchev, N. and Spratling, M.},
  title = {{Target Propagation in Recurrent Neural Networks}},
  journal = {Journal of Machine Learning Research},
  volume = {21},
  number = {7},
  year = {2020}
}""",
    "meulemans2020": """@inproceedings{meulemans2020,
  author = {Meulemans, A. and Carzaniga, F. and Suykens, J. and Sacramento, J. and Grewe, B.},
  title = {{A Theoretical Framework for Target Propagation}},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year = {2020}
}""",
    "roulet2023": """@article{roulet2023,
  author = {Roulet, V. and Harchaoui, Z.},
  title = {{Target Propagation via Regularized Inversion for Recurrent Neural Networks}},
  journal = {Transactions on Machine Learning Research},
  year = {2023}
}""",
    "seely2017": """@misc{seely2017,
  author = {Seely, J.},
  title = {{tensorflow-target-prop}},
  note = {Code},
  year = {2017}
}""",
    "shibuya2023": """@inproceedings{shibuya2023,
  author = {Shibuya, T. and Inoue, N. and Kawakami, R. and Sato, I.},
  title = {{Fixed-Weight Difference Target Propagation}},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year = {2023}
}""",
    "slmfun2024": """@misc{slmfun2024,
  author = {{ASFaust}},
  title = {{SLMfun, experiments/targetprop}},
  note = {Code, 2024-2025},
  year = {2024}
}""",
}


def citation(of: nn.Module | Rule | FeedbackTrainer) -> str:
    """What to cite, in BibTeX: this package, and the publications of the rules that a network uses.

    A rule and a trainer of feedback say their publications by ``sources``; one of your own may say keys or whole
    entries. A network does not know the trainer of its feedback, so give the trainer, which knows both.

    Args:
        of: a module, with all modules in it; a rule; or a trainer, with its network.

    Returns:
        The entries, each once, the package's own first, with an empty line between two.

    Raises:
        TypeError: something else.
        ValueError: one of ``sources`` is neither a key that is known here nor an entry, which begins with ``@``.

    >>> import tpext
    >>> entries = tpext.citation(tpext.nn.GRU(3, 4))
    >>> [line for line in entries.splitlines() if line.startswith("@")]
    ['@misc{tpext,', '@article{roulet2023,']
    """
    if isinstance(of, Rule):
        users: list[Rule | FeedbackTrainer] = [of]
    elif isinstance(of, FeedbackTrainer):
        users = [*_rules(of.net), of]
    elif isinstance(of, nn.Module):
        users = _rules(of)
    else:
        got = type(of).__name__
        raise TypeError(f"citation: of must be a module, a rule or a trainer, got {got}{not_an_instance(of)}")
    return "\n\n".join(dict.fromkeys([_PACKAGE, *(_entry(user, source) for user in users for source in user.sources)]))


def _rules(net: nn.Module) -> list[Rule | FeedbackTrainer]:
    rules = (getattr(module, "rule", None) for module in net.modules())
    return [rule for rule in rules if isinstance(rule, Rule)]


def _entry(user: Rule | FeedbackTrainer, source: str) -> str:
    if source.lstrip().startswith("@"):
        return source.strip()
    if source not in _ENTRIES:
        raise ValueError(
            f"citation: sources of {type(user).__name__} must be BibTeX entries, or keys among "
            f"{', '.join(_ENTRIES)}, got {source!r}"
        )
    return _ENTRIES[source]
