"""The report of an exported network, made from what the run left in its folder."""

from pathlib import Path
from typing import Any

from jaxmed.config import read_record
from jaxmed.report.page import Section, Table, Text, write_report
from jaxmed.train.run_folder import read_summary


def write_page(folder: Path) -> None:
    """Write report.html of a run folder from its config.json and outputs/."""
    record = read_record(folder / "config.json")
    summary = read_summary(folder)
    write_report(
        folder / "report.html",
        title="A network as ONNX",
        subtitle=f"outputs/network.onnx, {summary['bytes'] / 1024:.0f} kB, for scans of {summary['images']} images",
        summary=[
            (
                "Largest difference",
                float(f"{summary['largest_difference']:.2g}"),
                "to jax, share of each range",
            ),
            ("Rows", summary["rows"], "compared"),
            ("ONNX Runtime", round(summary["rates"]["ONNX Runtime"]), "voxels a second on this machine"),
            ("Protocol", summary["protocol"][:8], "start of its hash, in the file's metadata"),
        ],
        sections=[_outputs_section(summary), _use_section(summary)],
        config=record["config"],
        timing=[(name, seconds, f"{summary['rows']:,} rows") for name, seconds in summary["seconds"].items()],
        software=record["versions"] | {"device": summary["device"]},
        command=summary["command"],
    )


def _outputs_section(summary: dict[str, Any]) -> Section:
    rows = [
        (output["name"], output["definition"], output["unit"], output["bounds"][0], output["bounds"][1],
         summary["differences"][output["name"]])
        for output in summary["outputs"]
    ]  # fmt: skip
    caption = (
        "Columns of the output. Difference: the largest between ONNX Runtime and jax in double precision, as a share "
    )
    caption += f"of the range; jax in single precision, as predict runs it, is {summary['single_precision']:.1e} away."
    return Section(
        "What it computes", [Table(("Output", "Definition", "Unit", "Lowest", "Highest", "Difference"), rows, caption)]
    )


def _use_section(summary: dict[str, Any]) -> Section:
    return Section(
        "How to use it",
        [
            Text(
                [
                    f"Input 'signals': float32, voxels x {summary['images']} magnitudes in the order of the protocol, "
                    "not normalised; the number of voxels is free. The division by the mean unweighted signal happens "
                    "inside; voxels without unweighted signal come out as 0. Operators of opset 13.",
                    "The metadata holds the gradient table, its hash, names, definitions, units and constants. Check "
                    "the table before use: the same numbers in another order give maps that look like maps.",
                    "jaxmed noddi predict --runtime onnx --weights network.onnx runs it here; scripts/noddi_onnx.py "
                    "runs it with onnxruntime, numpy and nibabel alone.",
                    f"Protocol hash: {summary['protocol']}",
                    "For research only, not for diagnosis.",
                ]
            )
        ],
    )
