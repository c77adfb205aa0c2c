"""Maps of a diffusion scan by an exported network, with onnxruntime, numpy and nibabel alone: the way a scanner would.

    python scripts/noddi_onnx.py network.onnx dwi.nii.gz dwi.bval dwi.bvec OUT [--mask mask.nii.gz] [--threads N]

Writes OUT/ndi.nii.gz and so on (the names stand in the network's metadata). The gradient table of the scan must be the
one that the network was trained for: b-values to 3 % or 20 s/mm^2, directions to 2 degrees, rows in any order. A
rotation of all directions together makes no difference. Voxels with NaN or Inf are left out.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import onnxruntime

BVAL_TOLERANCE = (0.03, 20.0)
ANGLE_TOLERANCE = 2.0
TILTS = 5
CHUNK = 16384


class Refused(Exception):
    """Something in the input is wrong; the message is for the user."""


def main() -> int:
    """Read, check, estimate, write; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("network", "dwi", "bvals", "bvecs", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--mask", type=Path)
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except Refused as error:
        print(f"noddi_onnx: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Estimate the maps of one scan."""
    began = time.monotonic()
    session = open_network(arguments.network, arguments.threads)
    about = session.get_modelmeta().custom_metadata_map
    names = json.loads(about["parameters"])
    bvals, bvecs = read_numbers(arguments.bvals).reshape(-1), read_numbers(arguments.bvecs)
    order = match_table(about, bvals, bvecs, arguments.bvals)
    scan, magnitudes = read_image(arguments.dwi)
    images = session.get_inputs()[0].shape[1]
    if magnitudes.ndim != 4 or magnitudes.shape[3] != images:
        raise Refused(f"{arguments.dwi}: expected {images} images, found shape {magnitudes.shape}")
    mask = read_mask(arguments.mask, scan, magnitudes)
    bad = mask & ~np.isfinite(magnitudes).all(axis=3)
    mask = mask & ~bad
    if not mask.any():
        raise Refused(f"{arguments.dwi}: expected finite voxels, found NaN or Inf in all of them")
    if bad.any():
        print(f"{int(bad.sum()):,} voxels hold NaN or Inf; their maps are 0.")
    signals = magnitudes[mask][:, order]
    read = time.monotonic()
    blocks = [signals[start : start + CHUNK] for start in range(0, len(signals), CHUNK)]
    values = np.concatenate([session.run(["parameters"], {"signals": block})[0] for block in blocks])
    estimated = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for column, name in enumerate(names):
        volume = np.zeros(mask.shape, np.float32)
        volume[mask] = values[:, column]
        header = scan.header.copy()
        header.set_data_dtype(np.float32)
        header.set_slope_inter(1, 0)
        nib.save(nib.Nifti1Image(volume, scan.affine, header), arguments.out / f"{name}.nii.gz")
    written = time.monotonic()
    print(
        f"{len(values):,} voxels: read {read - began:.2f} s, network {estimated - read:.2f} s, "
        f"write {written - estimated:.2f} s, in all {written - began:.2f} s"
    )


def open_network(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open the file with as many threads as asked for."""
    if not path.exists():
        raise Refused(f"{path}: expected an exported network, found no such file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise Refused(f"{path}: expected an ONNX network, found a file that the runtime refuses ({error})") from error
    if "protocol_hash" not in session.get_modelmeta().custom_metadata_map:
        raise Refused(f"{path}: expected a network that names its protocol, found none in its metadata")
    return session


def read_numbers(path: Path) -> np.ndarray:
    """Read a text file of numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig").replace(",", " ")
        return np.array([[float(word) for word in line.split()] for line in text.splitlines() if line.strip()])
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: expected a text file of numbers, found none ({error})") from error


def match_table(about: dict[str, str], bvals: np.ndarray, bvecs: np.ndarray, path: Path) -> np.ndarray:
    """Return which row of a gradient table is which of the network's, or refuse it."""
    expected, directions = np.array(json.loads(about["bvals"])), np.array(json.loads(about["bvecs"]))
    is_weighted = expected > json.loads(about["b0_threshold"])
    wanted = f"{path}: expected the protocol of the network ({about['protocol_hash'][:12]})"
    bvecs = bvecs.T if bvecs.shape[0] == 3 else bvecs
    if bvals.shape != expected.shape or bvecs.shape != directions.shape:
        raise Refused(f"{wanted} with {len(expected)} images, found {len(bvals)}")
    length = np.linalg.norm(np.nan_to_num(bvecs), axis=1)
    wrong = np.flatnonzero((bvals > json.loads(about["b0_threshold"])) & ~(np.abs(length - 1) <= 0.1))
    if len(wrong):
        raise Refused(
            f"{path}: expected directions of unit length, found {length[wrong[0]]:.3g} in place {wrong[0] + 1}"
        )
    bvecs = np.nan_to_num(bvecs) / np.where(length > 0, length, 1.0)[:, None]
    allowed = np.abs(expected[:, None] - bvals) <= np.maximum(BVAL_TOLERANCE[0] * expected, BVAL_TOLERANCE[1])[:, None]
    best, error = None, np.inf
    for order in orders(allowed, expected, bvals, np.where(is_weighted[:, None], directions, 0.0), bvecs):
        angles = [
            np.degrees(np.arccos(np.minimum(np.abs(part @ part.T), 1.0)))
            for part in (directions[is_weighted], bvecs[order][is_weighted])
        ]
        off = float((np.abs(angles[0] - angles[1]) * (1 - np.eye(len(angles[0])))).max())
        if off < error:
            best, error = order, off
        if error <= 2 * ANGLE_TOLERANCE:
            return best
    if best is None:
        mine, theirs = np.argsort(expected, kind="stable"), np.argsort(bvals, kind="stable")
        rank = int(np.argmax(~allowed[mine, theirs]))
        row, other = mine[rank], theirs[rank]
        raise Refused(f"{wanted} with b = {expected[row]:g} in place {row + 1}, found b = {bvals[other]:g}")
    raise Refused(f"{wanted} with its directions, found angles between directions that differ by {error:.0f} degrees")


def orders(allowed: np.ndarray, expected: np.ndarray, bvals: np.ndarray, directions: np.ndarray, bvecs: np.ndarray):
    """Yield permutations of the scan's rows: its own order, then the nearest directions, turned and mirrored."""
    if np.all(np.diagonal(allowed)):
        yield np.arange(len(allowed))
    for mirror in ((1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1)):
        turned = bvecs * np.array(mirror)
        for _ in range(TILTS):
            cosine = turned @ directions.T
            order = assign(allowed, np.abs(expected[:, None] - bvals), np.abs(cosine.T), directions)
            if order is None:
                mine, theirs = np.argsort(expected, kind="stable"), np.argsort(bvals, kind="stable")
                if np.all(allowed[mine, theirs]):
                    yield theirs[np.argsort(mine)]
                return
            yield order
            sign = np.where(cosine[order, np.arange(len(order))] < 0, -1.0, 1.0)
            left, _, right = np.linalg.svd((turned[order] * sign[:, None]).T @ directions)
            turned = turned @ left @ right


def assign(allowed: np.ndarray, difference: np.ndarray, cosine: np.ndarray, directions: np.ndarray):
    """Pair rows, the nearest first; None where b-values leave rows alone."""
    count = len(allowed)
    angle = np.where(np.any(directions, axis=1)[:, None], np.degrees(np.arccos(np.minimum(cosine, 1.0))), 0.0)
    place = np.abs(np.arange(count)[:, None] - np.arange(count))
    cost = np.where(allowed, np.round(angle, 1) + 1e-3 * difference + 1e-6 * place, np.inf)
    order, taken = np.full(count, -1), np.zeros(count, bool)
    for pair in np.argsort(cost, axis=None, kind="stable")[: int(allowed.sum())]:
        row, other = divmod(int(pair), count)
        if order[row] < 0 and not taken[other]:
            order[row], taken[other] = other, True
    return order if taken.all() else None


def read_image(path: Path) -> tuple[nib.Nifti1Image, np.ndarray]:
    """Read an image as float32, with its voxels of one place side by side."""
    try:
        image = nib.load(path)
        return image, np.ascontiguousarray(np.asanyarray(image.dataobj), np.float32)
    except Exception as error:
        raise Refused(f"{path}: expected a NIfTI file, found none ({error})") from error


def read_mask(path: Path | None, scan: nib.Nifti1Image, magnitudes: np.ndarray) -> np.ndarray:
    """Read the mask, or take every voxel that has any signal."""
    if path is None:
        return np.nan_to_num(magnitudes, posinf=0.0, neginf=0.0).max(axis=3) > 0
    image, mask = read_image(path)
    if mask.shape != magnitudes.shape[:3] or not np.allclose(image.affine, scan.affine, atol=1e-3):
        raise Refused(f"{path}: expected the grid of the scan, found another")
    if not mask.any():
        raise Refused(f"{path}: expected a mask with voxels inside, found zeros only")
    return mask != 0


if __name__ == "__main__":
    sys.exit(main())
