"""The command line: parse, pick a stage, run it.

`jaxmed <system> <stage>` imports one module, jaxmed.systems.<system>.stages.<stage>, and calls its `run`. Nothing
above that line imports jax, so that help and mistakes answer at once. A user's mistake ends in one line and exit
code 2.
"""

import contextlib
import dataclasses
import errno
import functools
import importlib
import io
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Annotated, Any

from jaxmed.config import from_record, resolve_paths
from jaxmed.errors import InputError, Interrupted, nearest
from jaxmed.files import WRITE_ADVICE, expand_home, read_record

STAGES = {
    "tangerine pretrain": "train a 3D masked autoencoder on chest CTs without labels",
    "tangerine adapt": "fine-tune or probe it on labelled scans; AUROC with intervals, external sets",
    "tangerine embed": "features of every scan, as CSV and NPZ",
    "tangerine predict": "probabilities, and a map of what moved them, on the grid of each scan",
    "tangerine efficiency": "label fractions x seeds, pre-trained against from scratch",
    "retfound pretrain": "train an encoder on retinal images without labels: masked autoencoder, or DINOv2",
    "retfound adapt": "fine-tune or probe an encoder on labelled images; scores with intervals, external sets",
    "retfound embed": "features of every image, as CSV and NPZ",
    "retfound predict": "probabilities of every image, and a map of what moved them",
    "retfound compare": "encoders x ways of adapting x shares of labels x seeds, in one table",
    "profound pretrain": "train a masked autoencoder on prostate MRI without labels: ConvNeXt V2, or a transformer",
    "profound adapt": "fine-tune it on labelled cases, or train a head on it; scores with intervals, external sets",
    "profound segment": "train UPerNet on cases with label maps (gland, zones, lesions); Dice and HD95 with intervals",
    "profound predict": "probabilities of every case and what moved them, or label maps, on the grid of its T2w scan",
    "profound quality": "how good scans and pictures are, told without a reference; agreement with given labels",
    "profound quality-study": "share of good images x labels x pre-trained or not x seed: how many good ones it takes",
    "noddi simulate": "a diffusion scan with known microstructure, as NIfTI with gradient tables",
    "noddi fit": "NODDI maps (neurite density, dispersion, free water) of a diffusion scan",
    "noddi train": "train a network for one protocol on simulated signals",
    "noddi predict": "maps of a scan by a trained network, in seconds",
    "noddi export": "a trained network as ONNX, for a scanner",
    "noddi evaluate": "bias, spread and error of networks and fits against the Cramer-Rao bound",
    "brainfm generate": "a store of subjects from label maps and scans, and images drawn from it in any contrast",
    "brainfm train": "train one network for every task of brain scans, on images drawn from label maps and scans",
    "brainfm predict": "images, structures, distances, bias and MNI coordinates of scans of any modality",
    "cocolit train-autoencoder": "train the autoencoder of MRI, or of SUVR maps, against a discriminator",
    "cocolit encode": "the latents of all pairs of MRI and PET, as files",
    "cocolit train-diffusion": "train the U-Net that draws latents of SUVR maps",
    "cocolit train-controlnet": "train the ControlNet that tells it of the MRI, and the decoder with it",
    "cocolit translate": "a map of amyloid PET from a T1-weighted MRI, and where its samples disagree",
    "cocolit evaluate": "such maps against measured PET: similarity, regions, positivity, what the MRI does",
    "dynamicdps train-prior": "train a diffusion prior on slices or volumes, contrasts drawn from label maps too",
    "dynamicdps train-initial": "train a conditional enhancer on pairs made by the low-field simulator",
    "dynamicdps calibrate": "the bank that chooses starts, its compression, and the acquisition, for one prior",
    "dynamicdps enhance": "refine scans: images, uncertainty, residuals and tissue volumes on the grid of each",
    "dynamicdps compare": "conditional models, DynamicDPS and eleven other solvers on the same scans",
    "igndmoe simulate": "patients of a disease that spreads on a connectome, with the truth",
    "igndmoe fit": "the course of a disease, stages of subjects, weights of mechanisms over stage",
    "igndmoe stage": "stages of new subjects on a fitted course",
    "igndmoe forecast": "regional values at later ages, and how good such forecasts were",
    "igndmoe attribute": "which mechanism drives which stage, with bands, and what leaving one out costs",
    "igndmoe compare": "every model on the same folds of a cohort, or against one regional map",
    "mupm perturb": "questions about perturbed images and records, for any model to answer",
    "mupm answer": "ask a model these questions, each once: any endpoint of OpenAI's protocol, or LLaVA here",
    "mupm propagate": "how uncertainty of image and text adds up in a model's answers, from a table of these",
    "mupm transfer": "whether its coefficients predict other diagnoses, tasks and strengths without a refit",
    "mupm redundancy": "factors of the input that change neither the uncertainty nor the answers",
    "selfplay meta-train": "train generator and verifier of masks on familiar tasks, so that a few labels suffice",
    "selfplay train-policy": "teach the policy that thinks on familiar tasks, so that a new one needs less thought",
    "selfplay adapt": "adapt both to a new task by a few labelled images, and calibrate the verifier",
    "selfplay think": "segment images of that task: the longer it plays against itself, the better",
    "selfplay compare": "thinking curves of self-play, random proposals, gradient, and supervised networks",
}
SYSTEMS = {
    "tangerine": "a 3D masked autoencoder for chest CT and what grows on it (arXiv:2507.01881)",
    "retfound": "generalist and specialist encoders of retinal images, compared (arXiv:2509.03421)",
    "profound": "foundation models of prostate MRI, and what image quality does to them (arXiv:2508.11864)",
    "noddi": "tissue microstructure from diffusion MRI (arXiv:2507.12632)",
    "brainfm": "brain maps of a scan of any contrast, learnt from images drawn from labels (arXiv:2509.00549)",
    "cocolit": "amyloid PET from MRI, by latent diffusion with a ControlNet (arXiv:2508.01292)",
    "dynamicdps": "enhance low-field brain MRI without inventing anatomy (arXiv:2503.01075)",
    "igndmoe": "disease progression on the connectome, by mechanisms that change with stage (arXiv:2508.07032)",
    "mupm": "what image and text each add to the uncertainty of multimodal models (arXiv:2507.12945)",
    "selfplay": "segmentation by few labels that improves with thinking time (arXiv:2506.22075)",
}
# Stages that have plan_step: listed here, so that a mistake is answered without importing them all.
PLANNED = (
    "tangerine pretrain",
    "tangerine adapt",
    "retfound pretrain",
    "retfound adapt",
    "profound pretrain",
    "profound adapt",
    "brainfm train",
    "cocolit train-diffusion",
    "cocolit translate",
)
COMMANDS = {
    "weights": "jaxmed weights       published weights: list, show, import, export",
    "data": "jaxmed data          pack records for training on many machines; write synthetic data sets",
    "plan": "jaxmed plan          whether a stage's step fits a pod or GPUs that are not here, and how fast it is",
    "report": "jaxmed report RUN    write the page of a finished run again",
    "completion": "jaxmed completion    a script by which bash or zsh completes all this",
    "doctor": "jaxmed doctor        versions, devices, memory, and what is missing",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 some records failed, 2 a user's mistake.

    Of several processes of one run, one that fails does not return: it ends at once, since the others wait for it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        # Names of files may be bytes of any encoding, and a screen may show ASCII alone.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _dispatch(arguments)
    except BaseException as error:
        code = tell_error(error, arguments)
        if "jax" in sys.modules:
            from jaxmed.train.processes import leave_if_several

            leave_if_several(error, code)
        if code is None:
            raise
        return code


def tell_error(error: BaseException, arguments: Sequence[str]) -> int | None:
    """Say what ended a run in one line, where a user can cause it, and return the exit code; else return None."""
    if isinstance(error, InputError):
        return _fail(str(error), arguments)
    if isinstance(error, Interrupted):
        return _fail(str(error), arguments, code=128 + error.number)
    if isinstance(error, KeyboardInterrupt):
        return _fail("interrupted; the same command continues where it was saved", arguments, code=130)
    if isinstance(error, BrokenPipeError):  # the reader of a pipe, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, MemoryError | RuntimeError):
        # jax raises a RuntimeError of its own when a device, or this machine, has no memory left.
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            return None
        advice = "take a smaller batch, model or volume (--preset laptop or smoke), or a machine with more"
        return _fail(
            str(InputError("memory", "enough for this run", str(error)[:200] or "none left", advice)), arguments
        )
    if isinstance(error, OSError) and error.errno in WRITE_ADVICE:
        expected, advice = WRITE_ADVICE[error.errno or errno.EIO]
        found = (error.strerror or "an error").lower()
        return _fail(str(InputError(error.filename or "output", expected, found, advice)), arguments)
    return None


def _fail(line: str, arguments: Sequence[str], code: int = 2) -> int:
    if "--debug" in arguments:
        traceback.print_exc()
    print(f"jaxmed: {line}", file=sys.stderr)
    return code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview(), flush=True)
        return 0
    if arguments[0] in ("-V", "--version"):
        from jaxmed.versions import package_version

        print(f"jaxmed {package_version('jaxmed')}")
        return 0
    first, rest = arguments[0], arguments[1:]
    runners = {
        "doctor": _doctor, "report": _report, "weights": _weights, "data": _data, "completion": _completion,
        "plan": _plan,
    }  # fmt: skip
    if first in runners:
        return runners[first](rest)
    if first not in SYSTEMS:
        known = [*SYSTEMS, *COMMANDS]
        raise InputError(first, "a system or a command", "an unknown word", nearest(first, known))
    if not rest or rest[0] in ("-h", "--help"):
        print(importlib.import_module(f"jaxmed.systems.{first}").__doc__)
        return 0
    return _run_stage(first, rest[0], rest[1:])


def overview() -> str:
    """Return what `jaxmed` alone prints."""
    lines = ["jaxmed: published medical-imaging systems in JAX", ""]
    for system, summary in SYSTEMS.items():
        lines.append(f"{system}: {summary}")
        stages = {name: text for name, text in STAGES.items() if name.split()[0] == system}
        lines += [f"  jaxmed {name:<22} {text}" for name, text in stages.items()]
    lines += ["", "Other commands", *(f"  {text}" for text in COMMANDS.values())]
    lines += ["", "jaxmed SYSTEM explains a system; jaxmed SYSTEM STAGE --help shows every option."]
    lines += ["Try one without data: jaxmed noddi fit --preset smoke --out runs/noddi"]
    return "\n".join(lines)


def load_stage(system: str, stage: str) -> ModuleType:
    """Import the module of a stage."""
    if f"{system} {stage}" not in STAGES:
        stages = [name.split()[1] for name in STAGES if name.split()[0] == system]
        raise InputError(f"{system} {stage}", "a stage", "an unknown word", nearest(stage, stages))
    from jaxmed.recipes.stage import load_stage

    return load_stage(system, stage)


def _run_stage(system: str, stage: str, arguments: list[str]) -> int:
    from jaxmed.train.log import at_work, keep_speaking

    with contextlib.nullcontext() if "--quiet" in arguments else keep_speaking():
        with at_work("Starting"):  # the imports of a stage take seconds, on a busy machine many
            module = load_stage(system, stage)
            from jaxmed.train.mesh import join_where_asked
            from jaxmed.train.processes import wait_for_all
            from jaxmed.train.run_folder import open_run

            config, options = parse_stage(module, f"jaxmed {system} {stage}", arguments)
        with at_work("Waiting for the other processes of this run"):
            are_several = join_where_asked(config)
        tries_failed_again = getattr(module, "TRIES_FAILED_AGAIN", False)
        folder = open_run(system, stage, config, options, tries_failed_again=tries_failed_again)
        if are_several:  # the first begins to write in it once all have looked at it
            wait_for_all("run folder")
        if folder.status == "complete":
            if folder.note:
                print(f"Note: {folder.note}", file=sys.stderr)
            print(f"Complete already, nothing was run: {folder.report}  (--overwrite runs it again)")
            if options.bids:
                from jaxmed.recipes.bids import write_bids

                print(f"{write_bids(folder.path)} maps under the names of BIDS derivatives: {folder.outputs / 'bids'}")
            return 0
        code = module.run(config, dataclasses.replace(folder, smaller=_smaller(module, arguments)))
    print(f"Report: {folder.report}")
    return code or 0


def parse_stage(module: ModuleType, program: str, arguments: list[str]) -> tuple[Any, Any]:
    """Turn the words after `jaxmed SYSTEM STAGE` into its configuration and the run options.

    Values come from, in rising order: the stage's defaults, `--preset`, `--config`, the other options.

    Raises:
        InputError: An option is unknown or a value refused.
    """
    arguments = getattr(module, "released_words", list)(arguments)
    arguments, preset = _take(arguments, "--preset")
    arguments, stored = _take(arguments, "--config")
    kind = invocation(module, _default(module, program, preset, stored))
    parsed = _parse(kind, program, arguments, _describe(module), module.Config)
    return resolve_paths(parsed.config), parsed.run


def invocation(module: ModuleType, default: Any) -> type:
    """Return the record of what a stage's command takes: run options, and the stage's configuration with defaults."""
    import tyro

    from jaxmed.train.run_folder import RunOptions

    # tyro reads the fields of both records as if they stood in one, without a prefix.
    flat = tyro.conf.arg(name="")
    return dataclasses.make_dataclass(
        "Invocation",
        [
            ("run", Annotated[RunOptions, flat]),
            ("config", Annotated[module.Config, flat], dataclasses.field(default=default)),
        ],
        frozen=True,
    )


def _parse(kind: Any, program: str, arguments: list[str], description: str | None = None, config: Any = None) -> Any:
    """Let tyro parse words into a dataclass, or into a call of a function.

    Raises:
        InputError: An option is unknown or a value refused.
    """
    import tyro

    screen, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(errors):
            return tyro.cli(kind, prog=program, args=arguments, description=description)
    except SystemExit as error:
        if error.code in (0, None):
            print(screen.getvalue(), end="")
            raise
        raise parse_error(errors.getvalue() or screen.getvalue(), program, config) from error
    except ValueError as error:  # a configuration's own check
        raise parse_error(f"Error parsing config: {error}", program, config) from error


def _take(arguments: list[str], option: str) -> tuple[list[str], str | None]:
    """Remove one option and its value, in either spelling."""
    for index, word in enumerate(arguments):
        if word == option:
            if index + 1 == len(arguments):
                raise InputError(option, "a value", "nothing")
            return arguments[:index] + arguments[index + 2 :], arguments[index + 1]
        if word.startswith(option + "="):
            return arguments[:index] + arguments[index + 1 :], word.removeprefix(option + "=")
    return arguments, None


def presets_of(module: ModuleType) -> tuple[str, ...]:
    """Return the names of a stage's presets, the smallest first."""
    return tuple(name for name in ("smoke", "laptop", "paper") if hasattr(module, name))


def _smaller(module: ModuleType, arguments: list[str]) -> str:
    """Return the largest preset below the one in use, with what it says of itself."""
    presets = presets_of(module)
    chosen = _take(arguments, "--preset")[1] or "paper"
    below = presets[: presets.index(chosen)]
    if not below:
        return ""
    return f"--preset {below[-1]} ({(getattr(module, below[-1]).__doc__ or '').splitlines()[0].rstrip('.')})"


def _default(module: ModuleType, program: str, preset: str | None, stored: str | None) -> Any:
    if preset is not None and stored is not None:
        raise InputError("--preset", "no preset beside --config", preset, "give one of the two")
    if preset is not None:
        presets = presets_of(module)
        if preset not in presets:
            raise InputError("--preset", f"one of {', '.join(presets)}", preset, nearest(preset, presets))
        return getattr(module, preset)()
    if stored is None:
        return module.Config()
    record = read_record(stored)
    name = f"jaxmed {record.get('system')} {record.get('stage')}"
    if name != program:
        raise InputError(stored, f"a configuration of {program}", f"one of {name}")
    return from_record(module.Config, record.get("config"), stored)


def _describe(module: ModuleType) -> str:
    presets = "\n".join(
        f"  --preset {name:<7} {(getattr(module, name).__doc__ or '').splitlines()[0]}" for name in presets_of(module)
    )
    summary = (module.__doc__ or "").partition(": ")[2]
    return (
        f"{summary}\n\nPresets set defaults that other options may change:\n{presets}\n"
        "  --config RUN/config.json  repeats a run"
    )


def _prefix_of(kind: Any, place: str) -> str:
    """Return how a record of a configuration is called in options, where some records lend no prefix (`NO_PREFIX`)."""
    shown = ""
    for name in place.strip(".").replace("-", "_").split("."):
        hint = typing.get_type_hints(kind, include_extras=True).get(name) if dataclasses.is_dataclass(kind) else None
        marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
        kind = typing.get_args(hint)[0] if marks else hint
        if any(getattr(mark, "prefix_name", None) is False for mark in marks):
            shown = ""
        if not any(getattr(mark, "name", None) == "" for mark in marks):
            shown += f".{name}"
    return shown


def parse_error(screen: str, program: str, kind: Any = None) -> InputError:
    """Turn what tyro prints in a box, or between rules of dashes where there is no UTF-8, into one error.

    Args:
        screen: What tyro printed.
        program: Words of the command before the options.
        kind: Of the configuration that was parsed, whose records may lend options no prefix.
    """
    lines = [line.strip(" │") for line in screen.splitlines() if line.startswith("│")]
    lines = lines or [line.strip() for line in screen.splitlines() if line.strip()]
    if len(lines) > 2 and set(lines[1]) == {"-"}:
        lines = lines[2:]  # without the title
    rule = next((index for index, line in enumerate(lines) if set(line) in ({"─"}, {"-"})), len(lines))
    text, hints = " ".join(" ".join(lines[:rule]).split()), lines[rule + 1 :]
    advice = f"see {program} --help"
    if kind is not None:
        place = r"^Error parsing config((?:\.[\w-]+)+)"
        text = re.sub(place, lambda found: f"Error parsing config{_prefix_of(kind, found[1])}", text)
    if match := re.match(r"Unrecognized options: (.*)", text):
        close = next((line.split(",")[0].split()[0] for line in hints if line.startswith("--")), None)
        return InputError(match[1], "a known option", "an unknown one", f"did you mean '{close}'?" if close else advice)
    if match := re.match(r"Error parsing ([^:]*): (\S+): expected (.*), found (.*)", text):
        field = ".".join([*match[1].removeprefix("config").strip(".").split("."), match[2]]).strip(".")
        return InputError(field, match[3], match[4], advice)
    if match := re.match(r"Error parsing ([^:]*): invalid literal for int\(\) with base 10: (.*)", text):
        return InputError(match[1], "a whole number", match[2], advice)
    if match := re.match(r"Error parsing ([^:]*): could not convert string to float: (.*)", text):
        return InputError(match[1], "a number", match[2], advice)
    if match := re.match(r"Error parsing ([^:]*): no type matching (\S+) could be instantiated from (.*?)\. Got", text):
        return InputError(match[1], match[2].replace("{None}|", "None or "), match[3].strip("[]'"), advice)
    if match := re.match(r"invalid choice '(.*)' for argument '([^']*)'\. Expected one of \((.*)\)\.", text):
        # tyro's own order of the choices changes from run to run.
        choices = sorted(choice.strip(" '") for choice in match[3].split(","))
        return InputError(match[2], f"one of {', '.join(choices)}", match[1], advice)
    if match := re.match(r"Error parsing ([^:]*): (.*)", text):
        return InputError(match[1], "a valid value", match[2], advice)
    if match := re.match(r"Missing value for argument '([^']*)'. Expected (.*?)\.?$", text):
        return InputError(match[1], match[2], "fewer", advice)
    if text.startswith("Missing from") and rule > 1:
        return InputError(lines[1].split()[0], "a value", "nothing", advice)
    if "equired" in text:
        names = re.findall(r"--[a-z][\w.-]*", " ".join(lines))
        return InputError(names[0] if names else "arguments", "a value", "nothing", advice)
    return InputError("arguments", "valid options", text, advice)


def _weights(arguments: list[str]) -> int:
    from jaxmed import weights

    if not arguments or arguments[0] in ("-h", "--help"):
        print(weights.__doc__)
        return 0
    name, rest = arguments[0], [word for word in arguments[1:] if word != "--debug"]
    if name not in weights.COMMANDS:
        raise InputError(f"weights {name}", "a command", "an unknown word", nearest(name, weights.COMMANDS))
    return _call(weights.COMMANDS[name], f"jaxmed weights {name}", rest)


def _data(arguments: list[str]) -> int:
    from jaxmed import data_command

    if not arguments or arguments[0] in ("-h", "--help"):
        print(data_command.__doc__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in data_command.COMMANDS:
        raise InputError(f"data {name}", "a command", "an unknown word", nearest(name, data_command.COMMANDS))
    from jaxmed.train.log import at_work, keep_speaking

    with contextlib.nullcontext() if "--quiet" in rest else keep_speaking():
        if name == "phantoms":
            words = [word for word in rest if word != "--debug"]
            with at_work("Drawing"):
                return _call(data_command.write_phantoms, "jaxmed data phantoms", words)
        rest, stage = _take(rest, "--stage")
        rest, preset = _take(rest, "--preset")
        rest, place = _take(rest, "--weights")
        with at_work("Starting"):
            kind = data_command.packing_of(stage, preset, None if place is None else expand_home(place))
        packing = _parse(kind, "jaxmed data pack", rest, data_command.PACK)
        return data_command.pack_records(resolve_paths(packing))


def _call(function: Callable[..., None], program: str, arguments: list[str]) -> int:
    """Parse words as the arguments of a function, and call it."""

    # Parsed apart from the work, whose output is not to be caught.
    @functools.wraps(function)
    def call(*values: Any, **options: Any) -> tuple[Any, Any]:
        return values, options

    values, options = _parse(call, program, arguments)
    function(*values, **options)
    return 0


def _plan(arguments: list[str]) -> int:
    from jaxmed import plan
    from jaxmed.planning.topologies import find_topology

    if not arguments or arguments[0] in ("-h", "--help"):
        print(plan.__doc__)
        return 0
    if len(arguments) < 2 or arguments[0] not in SYSTEMS:
        found = " ".join(arguments[:2])
        raise InputError("plan", "a system and a stage", found, nearest(arguments[0], SYSTEMS))
    (system, stage), rest = arguments[:2], arguments[2:]
    rest, word = _take(rest, "--topology")
    rest, file = _take(rest, "--json")
    rest, limit = _take(rest, "--limit")
    if word is None:
        raise InputError("--topology", "a machine, such as v5p:4x4x4 or h200x8", "nothing")
    topology = find_topology(word)
    if limit is not None and not (limit.isdigit() and int(limit)):
        raise InputError("--limit", "a whole number from 1 on", limit)
    module = load_stage(system, stage)
    if not hasattr(module, "plan_step"):
        raise InputError(
            f"{system} {stage}", f"a stage that plans its step ({', '.join(PLANNED)})", "one that does not"
        )
    has_defaults = any(_take(rest, name)[1] is not None for name in ("--preset", "--config"))
    folder = _take(rest, "--out")[1]
    words = rest if has_defaults else ["--preset", "paper", *rest]
    words = words if folder is not None else [*words, "--out", "plan"]  # every stage asks for one
    config, _ = parse_stage(module, f"jaxmed {system} {stage}", words)
    found = plan.make_plan(system, stage, config, topology, int(limit or plan.LIMIT))
    from jaxmed.recipes.plan_tables import print_plan, write_outputs

    changed = {name: value for one in found["outcomes"] for name, value in one["changes"].items()}
    options = {name: option_words(module.Config, name, value) for name, value in changed.items()}
    best = found["outcomes"][found["best"] or 0]["changes"]
    options |= {name: option_words(module.Config, name, value) for name, value in best.items()}
    print_plan(found, options)
    write_outputs(found, options, file, folder)
    return 0 if found["best"] is not None else 1


def option_words(kind: Any, place: str, value: Any) -> str:
    """Return the words of the command line that set a field of a configuration, given its dotted path."""
    name = _prefix_of(kind, place).strip(".").replace("_", "-")
    if isinstance(value, bool):
        head, _, last = name.rpartition(".")
        return f"--{head}{'.' if head else ''}{'' if value else 'no-'}{last}"
    return f"--{name} {value}"


def _report(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print("usage: jaxmed report RUN\n\nWrite RUN/report.html again from what the run left in its folder.")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    folder = expand_home(arguments[0]).absolute()
    record = read_record(folder / "config.json")
    module = load_stage(str(record.get("system")), str(record.get("stage")))
    from jaxmed.recipes.stage import write_page

    if hasattr(module, "page"):
        write_page(folder, module.Config, module.Summary, module.page)
    else:
        module.report(folder)
    print(f"Report: {folder / 'report.html'}")
    return 0


def _completion(arguments: list[str]) -> int:
    shells = ("bash", "zsh")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(importlib.import_module("jaxmed.completion").__doc__)
        return 0
    if len(arguments) > 1 or arguments[0] not in shells:
        raise InputError("completion", f"one of {', '.join(shells)}", " ".join(arguments))
    from jaxmed.train.log import at_work, keep_speaking

    with keep_speaking(), at_work("Reading the options of all stages"):
        from jaxmed.completion import write_completion

        write_completion(arguments[0])
    return 0


def _doctor(arguments: list[str]) -> int:
    from jaxmed.doctor import examine

    if arguments:
        print("usage: jaxmed doctor\n\nShow versions, devices, memory, and what is missing.")
        return 0 if arguments[0] in ("-h", "--help") else 2
    return examine()


if __name__ == "__main__":
    sys.exit(main())
