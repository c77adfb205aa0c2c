"""BIDS derivatives of a run's maps: names, sidecars and the description of the data set."""

import json
import re

import numpy as np
import pytest

from jaxmed.io import nifti
from jaxmed.io.maps import write_map
from jaxmed.io.tables import write_table
from jaxmed.recipes.bids import write_bids
from jaxmed.volume import Volume

pytestmark = pytest.mark.core

VOLUME = Volume.make(np.arange(8, dtype=np.float32).reshape(2, 2, 2), np.diag([1.0, 2.0, 3.0, 1.0]))


def begin(path, system, stage, config):
    (path / "outputs").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"system": system, "stage": stage, "config": config}))
    return path / "outputs"


def put(outputs, *names, **further):
    for name in names:
        write_map(outputs, name, VOLUME, f"what {name} is", "1", {}, **further)


def files(outputs):
    found = [path.relative_to(outputs / "bids").as_posix() for path in (outputs / "bids").rglob("*.nii.gz")]
    for name in found:
        stem = name.removesuffix(".nii.gz")
        assert (outputs / "bids" / f"{stem}.json").exists()
        subject = re.match(r"(sub-[A-Za-z0-9]+)/", name)[1]
        assert name.rpartition("/")[2].startswith(f"{subject}_")
    return sorted(found)


def test_many_scans_keep_the_entities_of_their_names(tmp_path):
    outputs = begin(tmp_path, "dynamicdps", "enhance", {"input": "/data"})
    scans = {
        "sub-01_ses-2_anat_sub-01_ses-2_acq-low_T1w": "/data/sub-01/ses-2/anat/sub-01_ses-2_acq-low_T1w.nii.gz",
        "sub-01_ses-2_anat_sub-01_ses-2_acq-low_FLAIR": "/data/sub-01/ses-2/anat/sub-01_ses-2_acq-low_FLAIR.nii.gz",
        "scan_7": "/data/scan_7.nii.gz", "scan7": "/data/scan7.nii.gz",
    }  # fmt: skip
    for name, path in scans.items():
        (outputs / f"{name}.json").write_text(json.dumps({"name": name, "path": path}))
        put(outputs, f"{name}_enhanced", f"{name}_difference")
    put(outputs, "scan_7_ring_mask", "scan_7_segmentation")
    nifti.write(outputs / "scan_7_plain.nii.gz", VOLUME)  # without a sidecar it is no map
    assert write_bids(tmp_path) == 10
    assert files(outputs) == [
        "sub-01/ses-2/anat/sub-01_ses-2_acq-low_desc-difference_FLAIR.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_acq-low_desc-difference_T1w.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_acq-low_desc-enhanced_FLAIR.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_acq-low_desc-enhanced_T1w.nii.gz",
        "sub-scan7/anat/sub-scan7_desc-difference_map.nii.gz",
        "sub-scan7/anat/sub-scan7_desc-enhanced_map.nii.gz",
        "sub-scan7x2/anat/sub-scan7x2_desc-difference_map.nii.gz",
        "sub-scan7x2/anat/sub-scan7x2_desc-enhanced_map.nii.gz",
        "sub-scan7x2/anat/sub-scan7x2_desc-ring_mask.nii.gz",
        "sub-scan7x2/anat/sub-scan7x2_dseg.nii.gz",
    ]
    place = outputs / "bids" / "sub-01" / "ses-2" / "anat" / "sub-01_ses-2_acq-low_desc-enhanced_T1w"
    np.testing.assert_array_equal(nifti.read(place.with_name(f"{place.name}.nii.gz")).array, VOLUME.array)
    sidecar = json.loads(place.with_name(f"{place.name}.json").read_text())
    assert sidecar["Units"] == "1" and sidecar["Description"].startswith("what sub-01")
    assert sidecar["Sources"] == [scans["sub-01_ses-2_anat_sub-01_ses-2_acq-low_T1w"]]
    told = json.loads((outputs / "bids" / "dataset_description.json").read_text())
    assert told["DatasetType"] == "derivative" and told["BIDSVersion"] == "1.10.0"
    assert told["GeneratedBy"][0]["Name"] == "jaxmed"
    # A second time gives the same, and takes what it wrote before for no map.
    before = files(outputs)
    assert write_bids(tmp_path) == 10 and files(outputs) == before


def test_maps_of_one_diffusion_scan_say_model_and_parameter(tmp_path):
    outputs = begin(tmp_path, "noddi", "fit", {"scan": {"dwi": "/d/sub-07/dwi/sub-07_dir-AP_dwi.nii.gz"}, "seed": 0})
    put(outputs, "ndi", "fwf", "mask")
    assert write_bids(tmp_path) == 3
    assert files(outputs) == [
        "sub-07/dwi/sub-07_dir-AP_mask.nii.gz",
        "sub-07/dwi/sub-07_dir-AP_model-noddi_param-fwf_dwimap.nii.gz",
        "sub-07/dwi/sub-07_dir-AP_model-noddi_param-ndi_dwimap.nii.gz",
    ]


def test_maps_in_a_folder_are_named_by_the_table_and_synthetic_scans_are_phantoms(tmp_path):
    outputs = begin(tmp_path, "tangerine", "predict", {"input": None})
    write_table(outputs / "predictions.csv", ("path", "id"), [{"path": "/c/a b.nii.gz", "id": "a_b"}])
    put(outputs / "maps", "a_b__effusion")
    assert write_bids(tmp_path) == 1
    assert files(outputs) == ["sub-ab/ct/sub-ab_desc-effusion_ct.nii.gz"]
    outputs = begin(tmp_path / "noddi", "noddi", "fit", {"scan": {"dwi": None}})
    put(outputs, "ndi")
    assert write_bids(tmp_path / "noddi") == 1
    assert files(outputs) == ["sub-phantom/dwi/sub-phantom_model-noddi_param-ndi_dwimap.nii.gz"]


def test_a_map_of_pet_and_its_mri_lie_apart_and_no_map_makes_no_data_set(tmp_path):
    outputs = begin(tmp_path, "cocolit", "translate", {"input": "/m/sub-3_T1w.nii.gz"})
    (outputs / "sub-3_T1w.json").write_text(json.dumps({"path": "/m/sub-3_T1w.nii.gz"}))
    put(outputs, "sub-3_T1w_suvr", "sub-3_T1w_mri")
    assert write_bids(tmp_path) == 2
    assert files(outputs) == ["sub-3/anat/sub-3_desc-mri_T1w.nii.gz", "sub-3/pet/sub-3_desc-suvr_pet.nii.gz"]
    begin(tmp_path / "none", "cocolit", "evaluate", {})
    assert write_bids(tmp_path / "none") == 0 and not (tmp_path / "none" / "outputs" / "bids").exists()
