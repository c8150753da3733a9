"""Numbers that are one for all members of a stack, or one for each: a member gets the bits of a call of its own."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from comparison import Layer, assert_same_bits, layer, scan
from test_rnn_layer_backward import WAYS, backward_arguments
from test_rnn_target_scan import PASSES, learned_arguments, target_arguments
from torch import Tensor

import tpext
from tpext import LearnedInverse, RegularizedInverse, reference
from tpext.ops import _members, rnn_layer, rnn_target_scan
from tpext.rules import LayerRule, PerMember, RecurrentCall, RecurrentRule, number
from tpext.rules.base import of_member

# Of three members; a pass has as many slopes as are not the published one.
NUMBERS = {
    "target_step": [0.3, 2.0, 0.7],
    "margin": [1e-3, 0.3, 0.05],
    "slope_reg": [0.25, 0.0, 2.0],
    "scale": [1.5, 0.1, -3.0],
    "input_scale": [-0.7, 5.0, 1.0],
}
STACK = 3
SIZES: list[dict[str, Any]] = [
    {"T": 9, "B": 5, "H": 33},
    {"T": 150, "B": 40, "H": 31},  # rows in groups, several tiles of time
    {"T": 2, "B": 300, "H": 16},  # by whole arrays
]


def with_numbers(call: Any, numbers: dict[str, Any]) -> Any:
    """The call with those of the numbers that belong to its pass."""
    of_slope = getattr(call, "correction", "") == "linearized" and call.slope == "inverse"
    return call._replace(
        **{key: value for key, value in numbers.items() if key in call._fields and (key != "slope_reg" or of_slope)}
    )


def alone(call: Any, member: int) -> Any:
    """The call of one member; ``numbers`` are lists of one for each."""
    stacked = {
        key: value[member : member + 1] if value.shape[0] > 1 else value
        for key, value in call._asdict().items()
        if isinstance(value, Tensor) and key != "lengths"
    }
    numbers = {key: getattr(call, key)[member] for key in NUMBERS if isinstance(getattr(call, key, None), list)}
    return call._replace(**stacked, **numbers, reverse=[call.reverse[member]])


def assert_members_equal_calls_of_their_own(op: Any, call: Any) -> None:
    together = op(*call)
    apart = [op(*alone(call, member)) for member in range(STACK)]
    assert_same_bits(together, [torch.cat(outputs) for outputs in zip(*apart, strict=True)])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("correction", "credit"), PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_passes(correction: str, credit: str, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    inputs = scan(T=9, B=5, H=33, S=STACK, dtype=dtype, ragged=True, direction="mixed", enters="both")
    if correction == "learned":
        call: Any = rnn_target_scan._Learned(*learned_arguments(inputs, credit))
        op = torch.ops.tpext.rnn_learned_target_scan
    else:
        call = rnn_target_scan._Target(*target_arguments(inputs, correction, credit))
        op = torch.ops.tpext.rnn_target_scan
    assert_members_equal_calls_of_their_own(op, with_numbers(call, NUMBERS))


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_backward_passes_of_a_layer(way: tuple[str, str, bool], sizes: dict[str, int], threads: int) -> None:
    torch.set_num_threads(threads)
    inputs = scan(**sizes, S=STACK, dtype=torch.float32, direction="mixed", enters="end", own_inputs=True)
    # so small that nothing overflows, whatever the slope
    inputs = inputs._replace(weight_hh=inputs.weight_hh / 16)
    call = with_numbers(rnn_layer._Backward(*backward_arguments(inputs, way)), NUMBERS)
    assert_members_equal_calls_of_their_own(torch.ops.tpext.rnn_layer_backward, call)


def test_members_that_share_an_input_add_to_its_gradient() -> None:
    inputs = scan(T=9, B=5, H=33, S=STACK, dtype=torch.float64)
    call = with_numbers(rnn_layer._Backward(*backward_arguments(inputs)), NUMBERS)
    shared = torch.ops.tpext.rnn_layer_backward(*call)[0]
    own = torch.ops.tpext.rnn_layer_backward(*call._replace(input=call.input.repeat(STACK, 1, 1, 1)))[0]
    torch.testing.assert_close(shared, own.sum(0, keepdim=True), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_equal_numbers_are_one_number(way: tuple[str, str, bool]) -> None:
    inputs = scan(T=9, B=5, H=33, S=STACK, dtype=torch.float32, own_inputs=True)
    for at in range(STACK):
        one = {key: values[at] for key, values in NUMBERS.items()}
        call = rnn_layer._Backward(*backward_arguments(inputs, way))
        several = with_numbers(call, {key: [value] * STACK for key, value in one.items()})
        outputs = torch.ops.tpext.rnn_layer_backward(*with_numbers(call, one))
        assert_same_bits(torch.ops.tpext.rnn_layer_backward(*several), outputs)


def test_a_number_matters() -> None:
    """The tests above see each number: with another one for the second member its outputs differ, and its alone."""
    inputs = scan(T=9, B=5, H=33, S=STACK, dtype=torch.float64, own_inputs=True)
    seen: dict[str, Any] = {"target_step": 0, "margin": 0, "slope_reg": 0, "scale": 1, "input_scale": 0}
    inputs = inputs._replace(states=inputs.states.clamp(-0.9, 0.9))
    call = with_numbers(rnn_layer._Backward(*backward_arguments(inputs)), NUMBERS)
    before = torch.ops.tpext.rnn_layer_backward(*call)
    for key, output in seen.items():
        changed = [value + 0.125 * (member == 1) for member, value in enumerate(NUMBERS[key])]
        after = torch.ops.tpext.rnn_layer_backward(*call._replace(**{key: changed}))
        same = [bool((a == b).all()) for a, b in zip(before[output], after[output], strict=True)]
        assert same == [True, False, True], key


@pytest.mark.parametrize("name", NUMBERS)
def test_an_op_refuses_another_count(name: str) -> None:
    inputs = scan(T=2, B=3, H=4, S=STACK)
    call = with_numbers(rnn_layer._Backward(*backward_arguments(inputs)), {name: NUMBERS[name][:2]})
    with pytest.raises(ValueError, match=f"^rnn_layer_backward: {name} must be one number or S=3 of them, got 2$"):
        torch.ops.tpext.rnn_layer_backward(*call)


@pytest.mark.parametrize("name", ["target_step", "margin", "slope_reg"])
def test_an_op_checks_the_range_of_each(name: str) -> None:
    inputs = scan(T=2, B=3, H=4, S=STACK)
    call = rnn_target_scan._Target(*target_arguments(inputs, "linearized", "local"))
    with pytest.raises(ValueError, match=rf"^rnn_target_scan: {name} must be .*, got -1\.0$"):
        torch.ops.tpext.rnn_target_scan(*call._replace(**{name: [0.5, -1.0, 0.5]}))


def test_opcheck() -> None:
    inputs = scan(T=2, B=3, H=4, S=STACK, dtype=torch.float32)
    backward = with_numbers(rnn_layer._Backward(*backward_arguments(inputs)), NUMBERS)
    torch.library.opcheck(torch.ops.tpext.rnn_layer_backward.default, tuple(backward))
    target = with_numbers(rnn_target_scan._Target(*target_arguments(inputs, "linearized", "local")), NUMBERS)
    torch.library.opcheck(torch.ops.tpext.rnn_target_scan.default, tuple(target))
    learned = with_numbers(rnn_target_scan._Learned(*learned_arguments(inputs, "local")), NUMBERS)
    torch.library.opcheck(torch.ops.tpext.rnn_learned_target_scan.default, tuple(learned))


# What CUDA does with numbers that differ, by the kernels of the CPU.


def test_passes_one_after_another() -> None:
    inputs = scan(T=9, B=5, H=12, S=STACK, ragged=True, direction="mixed", enters="both")
    target = rnn_target_scan._Target(*target_arguments(inputs, "difference", "through_time", False))
    learned = rnn_target_scan._Learned(*learned_arguments(inputs, "local"))
    for op, call in ((torch.ops.tpext.rnn_target_scan, target), (torch.ops.tpext.rnn_learned_target_scan, learned)):
        numbered = with_numbers(call, NUMBERS)
        assert_same_bits(_members.each_alone(op, numbered), op(*numbered))


@pytest.mark.parametrize("own_inputs", [False, True])
def test_backward_passes_one_after_another(own_inputs: bool) -> None:
    inputs = scan(T=9, B=5, H=12, S=STACK, ragged=True, direction="mixed", enters="both", own_inputs=own_inputs)
    call = with_numbers(rnn_layer._Backward(*backward_arguments(inputs)), NUMBERS)
    for a, b in zip(
        _members.by_numbers(rnn_layer._backward_by_products, call),
        torch.ops.tpext.rnn_layer_backward(*call),
        strict=True,
    ):
        # torch's products in place of sums by tiles
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


# The inverse.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (12, 12), (48, 40), (60, 60), (40, 130)])
@pytest.mark.parametrize("batch", [(1,), (3,), (16,), (37,), (2, 3)])
@pytest.mark.parametrize("zeros", [False, True])
def test_inverses(shape: tuple[int, int], batch: tuple[int, ...], dtype: torch.dtype, zeros: bool) -> None:
    """Groups of one matrix a lane, rests of them, and one matrix after another."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(*batch, *shape, generator=generator, dtype=dtype)
    count = int(np.prod(batch))
    reg = [0.0 if zeros and i % 3 == 1 else 0.5 + i for i in range(count)]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        inverse = torch.ops.tpext.regularized_inverse(weight, reg)
        matrices = weight.flatten(0, -3)
        alone = [torch.ops.tpext.regularized_inverse(*pair) for pair in zip(matrices, reg, strict=True)]
        assert torch.equal(inverse, torch.stack(alone).view(inverse.shape))
    expected = reference.regularized_inverse(weight.double().numpy(), np.reshape(reg, batch))
    # the Gram matrix squares a condition of some hundreds without a ridge
    torch.testing.assert_close(inverse.double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-3)


def test_an_inverse_has_derivatives_by_each_ridge() -> None:
    for shape in ((4, 3), (3, 4)):
        weight = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
        for reg in ([0.5, 2.0], [0.0, 1.0]):
            assert torch.autograd.gradcheck(lambda w, reg=reg: tpext.ops.regularized_inverse(w, reg), weight)
            assert torch.autograd.gradgradcheck(lambda w, reg=reg: tpext.ops.regularized_inverse(w, reg), weight)
    torch.library.opcheck(torch.ops.tpext.regularized_inverse.default, (torch.randn(2, 4, 3), [0.5, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_matrix_is_named_with_its_ridge(dtype: torch.dtype) -> None:
    weight = torch.eye(3, dtype=dtype).repeat(4, 1, 1)
    weight[:3] = 0
    text = "the Gram matrix of weight[1] plus reg=0.0 is singular to the precision of float64"
    with pytest.raises(tpext.SingularError, match=re.escape(text)):
        tpext.ops.regularized_inverse(weight, (1.0, 0.0, 2.0, 0.0))
    weight[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weight\[2\] has NaN or infinite elements"):
        tpext.ops.regularized_inverse(weight, (1.0, 0.0, 2.0, 0.0))


def test_an_inverse_refuses_other_counts_and_ranges() -> None:
    for reg, text in (
        ([1.0, 2.0], "reg must be one number or batch=3 of them, got 2"),
        ([], "reg must be one number or batch=3 of them, got 0"),
        ((1.0, -1.0, 1.0), "reg must be a finite number >= 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'regularized_inverse: {text}')}$"):
            tpext.ops.regularized_inverse(torch.eye(3).repeat(3, 1, 1), reg)


# Rules.

RULES = [
    RegularizedInverse(reg=(0.1, 1.0), target_step=(0.5, 2.0)),
    RegularizedInverse(reg=(0.0, 3.0), margin=(1e-3, 0.2), correction="difference", target_step=(0.5, 2.0)),
    RegularizedInverse(slope_reg=(0.0, 0.5), credit="local", normalize=False, target_step=(0.25, 0.5)),
    RegularizedInverse(reg=(0.1, 1.0), correction="none", target_step=1e-2),
    RegularizedInverse(reg=(0.1, 1.0), input_rule="target", target_step=(0.5, 3.0)),
    LearnedInverse(target_step=(0.1, 0.3)),
    LearnedInverse(target_step=(0.1, 0.3), credit="local", normalize=False),
]


def gradients(rule: RecurrentRule, inputs: Layer, owned: Sequence[Tensor], every: int | None) -> list[Tensor]:
    """Of input, h0, weight_ih, weight_hh and bias, stacked."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:5] if tensor is not None]
    states, h_n = rule.run_recurrent(RecurrentCall(*leaves, *inputs[5:], tuple(owned), every))
    (states.square().sum() + h_n.cos().sum()).backward()  # type: ignore[no-untyped-call]
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("every", [None, 4])
def test_members_of_a_layer_equal_layers_of_their_own(
    rule: RecurrentRule, dtype: torch.dtype, every: int | None
) -> None:
    inputs = layer(T=9, B=5, I=3, H=17, S=2, dtype=dtype, direction="mixed", own_inputs=True)
    owned = [torch.randn(2, 17, 17, dtype=dtype) / 5, torch.randn(2, 17, dtype=dtype) / 5]
    owned = owned if rule.learns else []
    together = gradients(rule, inputs, owned, every)
    apart = []
    for member in range(2):
        own = [t if t is None else t[member : member + 1] for t in inputs[:5]]
        single = Layer(*own, inputs.lengths, [inputs.reverse[member]], inputs.nonlinearity)
        apart.append(gradients(of_member(rule, member), single, [t[member : member + 1] for t in owned], every))
    joined = [torch.cat(one) for one in zip(*apart, strict=True)]
    if rule.learns or rule.correction == "none":
        # torch's products, of which these passes' pre-activations are made, have other bits in a stack
        for a, b in zip(together, joined, strict=True):
            torch.testing.assert_close(a, b, rtol=1e4 * torch.finfo(dtype).eps, atol=1e4 * torch.finfo(dtype).eps)
    else:
        assert_same_bits(together, joined)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("every", [None, 3])
def test_directions_of_a_network(rule: RecurrentRule, every: int | None) -> None:
    """One number a direction: the gradients of its parameters are those of a rule with its number for both."""
    x, grads = torch.randn(7, 4, 3), []
    for one in (rule, of_member(rule, 0), of_member(rule, 1)):
        torch.manual_seed(1)
        rnn = tpext.nn.RNN(3, 9, bidirectional=True, rule=one, checkpoint_every=every)
        rnn(x)[0].square().sum().backward()
        grads.append({name: p.grad for name, p in rnn.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[2 if name.endswith("_reverse") else 1][name]), name


@pytest.mark.parametrize("rule", RULES[:3], ids=repr)
@pytest.mark.parametrize("every", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_compiled(rule: RecurrentRule, every: int | None) -> None:
    """Without a break of the graph, and anew where one of a tuple's numbers changes."""
    torch._dynamo.reset()
    rnn = tpext.nn.RNN(3, 9, 2, bidirectional=True, rule=rule, checkpoint_every=every)
    x = torch.randn(7, 4, 3)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    changed = dataclasses.replace(rule, target_step=(0.75, 2.0))
    for one in (rule, changed, of_member(rule, 0)):
        rnn.rule = one
        found = []
        for run in (compiled, rnn):
            rnn.zero_grad()
            run(x)[0].square().sum().backward()
            found.append([p.grad.clone() for p in rnn.parameters() if p.grad is not None])
        assert_same_bits(*found)


def test_one_member_takes_a_tuple_of_one() -> None:
    x, grads = torch.randn(7, 4, 3), []
    for reg in (0.5, (0.5,)):
        torch.manual_seed(1)
        rnn = tpext.nn.RNN(3, 9, rule=RegularizedInverse(reg=reg))
        rnn(x)[0].sum().backward()
        grads.append([p.grad for p in rnn.parameters()])
    assert_same_bits(*grads)


def test_a_layer_names_the_number_whose_count_is_not_its_own() -> None:
    rule = RegularizedInverse(target_step=(0.5, 1.0, 2.0), margin=0.1)
    text = "RegularizedInverse: target_step must be one number or S=2, one for each direction of the layer, got 3: "
    with pytest.raises(ValueError, match=re.escape(text)):
        tpext.nn.RNN(3, 4, bidirectional=True, rule=rule)
    rnn = tpext.nn.RNN(3, 4, rule=RegularizedInverse(reg=(0.5,)))
    with pytest.raises(ValueError, match="RegularizedInverse: reg must be one number or S=1, one for each direction"):
        rnn.rule = RegularizedInverse(reg=(0.5, 1.0))
    inputs = layer(T=3, B=2, I=3, H=4, S=2)
    with pytest.raises(ValueError, match=re.escape(text)):
        rule.run_recurrent(RecurrentCall(*inputs))


def test_a_rule_with_tuples_is_a_value() -> None:
    rule = RegularizedInverse(reg=(1 / 3, 2), target_step=(0.5,))
    assert (rule.reg, rule.target_step) == ((1 / 3, 2.0), (0.5,))
    assert all(type(one) is float for one in rule.reg)  # type: ignore[union-attr]
    assert rule == RegularizedInverse(reg=[1 / 3, 2.0], target_step=(0.5,)) != RegularizedInverse(reg=1 / 3)  # type: ignore[arg-type]
    assert hash(rule) == hash(pickle.loads(pickle.dumps(rule)))
    assert pickle.loads(pickle.dumps(rule)) == rule == eval(repr(rule))
    assert dataclasses.replace(rule, reg=1.0).reg == 1.0
    assert [of_member(dataclasses.replace(rule, target_step=0.5), m).reg for m in range(2)] == [1 / 3, 2.0]
    assert of_member(RegularizedInverse(reg=2.0), 1) == RegularizedInverse(reg=2.0)


@pytest.mark.parametrize("value", [(), (1.0, -1.0), (1.0, float("inf")), (1.0, True), (1.0, "1"), ((1.0,),)])
def test_the_range_holds_for_each(value: Any) -> None:
    text = f"RegularizedInverse: reg must be a finite number >= 0, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        RegularizedInverse(reg=value)


def test_other_rules_and_numbers_stay_single() -> None:
    makes = [
        (lambda: LearnedInverse(noise=(0.1, 0.2)), "LearnedInverse: noise must be a finite number"),  # type: ignore[arg-type]
        (lambda: tpext.RegularizedLeastSquares(reg=(0.1, 0.2)), "RegularizedLeastSquares: reg must be a finite number"),  # type: ignore[arg-type]
        (lambda: tpext.DifferenceTargets(target_step=(0.1, 0.2)), "DifferenceTargets: target_step must be a finite"),  # type: ignore[arg-type]
    ]
    for make, text in makes:
        with pytest.raises(ValueError, match=f"^{text}.*{re.escape('got (0.1, 0.2)')}$"):
            make()


@dataclasses.dataclass(frozen=True)
class Scaled(RecurrentRule, LayerRule):  # type: ignore[misc]
    """A rule of a user's, for both kinds of layers."""

    scale: PerMember = number(0.5, low=0.0)

    def feedback(self, weight_hh: Tensor, *owned: Tensor) -> Tensor:
        scale = weight_hh.new_tensor(self.scale).view(-1, 1, 1)
        return scale * weight_hh

    def propagate(self, call: Any, displacement: Tensor) -> Tensor:
        return displacement @ call.weight * self.scale


def test_a_rule_of_ones_own() -> None:
    x = torch.randn(5, 2, 3)
    tpext.nn.RNN(3, 4, bidirectional=True, rule=Scaled((0.5, 0.25)))(x)[0].sum().backward()
    tpext.nn.MLP([3, 4, 2], rule=Scaled(0.5))(x).sum().backward()
    with pytest.raises(ValueError, match=re.escape("Scaled: scale must be one number here, got 2: (0.5, 0.25)")):
        tpext.nn.MLP([3, 4, 2], rule=Scaled((0.5, 0.25)))
