"""Live parity with AMICO: its kernels to the last digits it has, its fit in correlation and bias."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.cli import main
from jaxmed.io.amico import open_amico
from jaxmed.io.gradient_match import Table
from jaxmed.io.gradients import write_gradients
from jaxmed.io.tables import read_table
from jaxmed.physics import noddi as model
from jaxmed.physics.acquisition import two_shell_protocol
from jaxmed.physics.microstructure import draw_directions
from jaxmed.systems import noddi

# dipy warns of its own bases, which AMICO chooses.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")]

BVALS, BVECS = two_shell_protocol()
# AMICO's atoms, from its documentation of the dictionary.
ODI_ATOMS = (0.03, 0.06, *np.linspace(0.09, 0.99, 10))


@pytest.fixture(scope="module")
def amico(tmp_path_factory):
    """AMICO keeps its rotation matrices in dipy's folder, by default in the user's home."""
    os.environ["DIPY_HOME"] = str(tmp_path_factory.mktemp("dipy"))
    import amico
    import amico.lut
    import amico.scheme
    import amico.synthesis
    import amico.util

    amico.set_verbose(0)
    return amico


def test_kernels_equal_amicos(amico):
    """Specification item i.5, at the order of AMICO's own series; a higher order differs by its truncation."""
    scheme = amico.scheme.Scheme(np.concatenate([BVECS, BVALS[:, None]], axis=1), 0)
    fine = amico.lut.create_high_resolution_scheme(scheme, 1)
    directions = fine.raw[:, :3] / np.linalg.norm(fine.raw[:, :3], axis=1, keepdims=True)
    intra, extra = amico.synthesis.NODDIIntraCellular(fine), amico.synthesis.NODDIExtraCellular(fine)
    worst = {"intra": 0.0, "extra": 0.0, "truncation": 0.0}
    with jax.enable_x64(True):
        z = jnp.array([0.0, 0.0, 1.0])
        for odi in ODI_ATOMS:
            kappa = 1 / np.tan(odi * np.pi / 2)
            theirs = intra.get_signal(1.7e-3, kappa), extra.get_signal(1.7e-3, kappa, 0.6)
            for order in (12, 20):
                ours = model.compartments(jnp.array(0.6), jnp.array(odi), z, fine.b, directions, order=order)
                differences = [float(np.abs(np.asarray(mine) - their).max()) for mine, their in zip(ours, theirs)]  # noqa: B905
                if order == 12:
                    worst["intra"] = max(worst["intra"], differences[0])
                    worst["extra"] = max(worst["extra"], differences[1])
                else:
                    worst["truncation"] = max(worst["truncation"], differences[0])
    assert worst["intra"] < 1e-7 and worst["extra"] < 1e-7, worst
    assert 1e-6 < worst["truncation"] < 1e-4, worst


def test_maps_correlate_with_amicos_and_have_the_smaller_bias():
    count, snr = 1440, 30.0
    parameter_key, direction_key, noise_key = jax.random.split(jax.random.key(0), 3)
    unit = jax.random.uniform(parameter_key, (3, count))
    truth = {"ndi": 0.3 + 0.6 * unit[0], "odi": 0.05 + 0.55 * unit[1], "fwf": 0.4 * unit[2]}
    clean = np.asarray(model.signal(*truth.values(), draw_directions(direction_key, count), BVALS, BVECS))
    noise = np.asarray(jax.random.normal(noise_key, (2, *clean.shape))) / snr
    signals = (1000 * np.hypot(clean + noise[0], noise[1])).astype(np.float32)
    with open_amico(Table.make(BVALS, BVECS, 50.0), 1.7, 3.0) as estimator:
        theirs = dict(zip(truth, estimator(signals).T, strict=True))
    maps = noddi.fit(signals, BVALS, BVECS, sigma=1000 / snr)
    for name, values in truth.items():
        ours, known = getattr(maps, name), np.asarray(values)
        assert np.corrcoef(ours, theirs[name])[0, 1] > 0.97, name
        errors = {who: found - known for who, found in (("ours", ours), ("theirs", theirs[name]))}
        assert abs(errors["ours"].mean()) < max(abs(errors["theirs"].mean()), 0.005), name


def test_an_evaluation_has_amico_among_its_estimators(tmp_path):
    write_gradients(tmp_path / "b.bval", tmp_path / "b.bvec", *two_shell_protocol(3, ((12, 711.0), (18, 2855.0))))
    words = ["--bvals", tmp_path / "b.bval", "--bvecs", tmp_path / "b.bvec", "--points", 2, "--repeats", 8, "--snr", 30]
    assert main(["noddi", "evaluate", *map(str, words), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    summary = json.loads((tmp_path / "run" / "outputs" / "summary.json").read_text())
    assert summary["estimators"] == ["MLE", "AMICO"]
    rows = read_table(tmp_path / "run" / "outputs" / "scores.csv").rows
    errors = {row["parameter"]: float(row["rmse"]) for row in rows if row["estimator"] == "AMICO"}
    assert all(0 < errors[name] < 0.3 for name in ("ndi", "odi", "fwf")), errors
