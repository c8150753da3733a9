"""What is done often, each in an environment of its own: `nox` runs tests, lint and docs, `nox -l` lists all.

Arguments after `--` go to the program. `nox -R` installs nothing anew.
"""

from __future__ import annotations

import nox

nox.options.sessions = ["tests", "lint", "docs"]
nox.options.reuse_venv = "yes"

PROJECT = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, *groups: str) -> None:
    """The package, built, with all that its tests need; and dependency groups."""
    session.install(".[experiments,test]", *nox.project.dependency_groups(PROJECT, *groups))


@nox.session
def tests(session: nox.Session) -> None:
    """The tests that are not slow."""
    install(session)
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Lint, format and types: the hooks of .pre-commit-config.yaml on all files."""
    # not the package itself, whose C++ takes minutes to build: types are checked in the sources
    packages = PROJECT["project"]
    needed = [*packages["dependencies"], *packages["optional-dependencies"]["experiments"]]
    session.install(*needed, *nox.project.dependency_groups(PROJECT, "lint"))
    session.run("pre-commit", "run", "--all-files", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, into site/; links resolve, public names have an entry. `nox -s docs -- serve` shows it."""
    session.install(*nox.project.dependency_groups(PROJECT, "docs"))
    session.run("mkdocs", *(session.posargs or ["build", "--strict"]), env={"NO_MKDOCS_2_WARNING": "1"})
    if not session.posargs:
        install(session)
        session.run("pytest", "python_tests/test_docs.py", "-k", "reference or links")


@nox.session
def slow(session: nox.Session) -> None:
    """The tests marked slow: more sizes and options of what the others cover."""
    install(session)
    # One of them builds the module with sanitizers.
    session.install(*PROJECT["build-system"]["requires"])
    session.run(".ci/slow", *session.posargs, external=True)


@nox.session
def emulation(session: nox.Session) -> None:
    """The CUDA kernels, compiled as C++ and run on the CPU, against their oracles."""
    install(session)
    session.install(*PROJECT["build-system"]["requires"])
    # the build in the environment's folder: another Python has another
    session.run(".ci/emulation", f"{session.virtualenv.location}/emulation", *session.posargs, external=True)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """The timed rows on the CPU, 7 minutes of an idle machine; CONTRIBUTING.md says how to keep them."""
    install(session)
    session.run("pytest", "benchmarks", "-m", "not gpu", "--benchmark-enable", "-s", *session.posargs)
