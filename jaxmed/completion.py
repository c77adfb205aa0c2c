"""`jaxmed completion bash|zsh`: a script by which a shell completes systems, stages, commands and their options.

tyro writes it from the same types that parse the options. All stages are imported for that, which takes a while, once:

  jaxmed completion bash > ~/.local/share/bash-completion/completions/jaxmed
  jaxmed completion zsh > ~/.zfunc/_jaxmed        (with fpath+=~/.zfunc before compinit in .zshrc)
"""

# Types are made at run time here, of the table of stages.
# pyright: reportInvalidTypeForm=false, reportInvalidTypeArguments=false

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from jaxmed import data_command, weights
from jaxmed.cli import PLANNED, STAGES, SYSTEMS, invocation, load_stage, presets_of
from jaxmed.doctor import examine


def write_completion(shell: str, names: Sequence[str] = tuple(STAGES)) -> None:
    """Print the script of a shell.

    Args:
        shell: "bash" or "zsh".
        names: Stages that it knows, "SYSTEM STAGE".
    """
    try:
        tyro.cli(_everything(names), prog="jaxmed", args=["--tyro-write-completion", shell, "-"])
    except SystemExit as end:  # how tyro ends after printing
        if end.code not in (0, None):
            raise


def _everything(names: Sequence[str]) -> Any:
    systems = dict.fromkeys(name.split()[0] for name in names)
    commands: dict[str, Any] = {
        system: _one_of({name.split()[1]: _stage(name) for name in names if name.split()[0] == system})
        for system in systems
    }
    commands["weights"] = _one_of(weights.COMMANDS)
    commands["data"] = _one_of({"pack": _Packing, "phantoms": data_command.write_phantoms})
    commands |= {"plan": _plan, "report": _report, "completion": _completion, "doctor": examine}
    return _union(commands)


def _one_of(commands: dict[str, Callable[..., Any]]) -> type:
    """Return a record whose only field, without a name of its own, is one of some commands."""
    field = ("command", Annotated[_union(commands), tyro.conf.arg(name="")])
    return dataclasses.make_dataclass("Commands", [field], frozen=True)


def _union(commands: dict[str, Callable[..., Any]]) -> Any:
    kinds = [
        Annotated[Any, tyro.conf.subcommand(name=name, prefix_name=False, constructor=kind)]
        for name, kind in commands.items()
    ]
    # One alone would not be a choice.
    return Union[tuple(kinds)] if len(kinds) > 1 else Union[kinds[0], Annotated[None, tyro.conf.Suppress]]  # noqa: UP007


def _stage(name: str) -> type:
    module = load_stage(*name.split())
    kind = invocation(module, module.Config())
    further = [
        ("preset", Literal[presets_of(module)], dataclasses.field(default="paper")),
        ("stored", Annotated[Path | None, tyro.conf.arg(name="config")], dataclasses.field(default=None)),
    ]
    return dataclasses.make_dataclass("Stage", further, bases=(kind,), frozen=True)


@dataclasses.dataclass(frozen=True)
class _Packing(data_command.Packing):
    """The options of `jaxmed data pack`, with those that the command line takes before tyro."""

    stage: str = ""
    preset: str = "paper"
    weights: Path | None = None


def _plan(
    system: Literal[tuple(SYSTEMS)],
    stage: Literal[tuple(name.split()[1] for name in PLANNED)],
    /,
    topology: str = "",
    limit: int = 0,
    json: Path | None = None,
) -> None:
    """Say whether a stage's step fits machines that are not here."""


def _report(run: Path, /) -> None:
    """Write the page of a finished run again."""


def _completion(shell: Literal["bash", "zsh"], /) -> None:
    """Print this script."""
