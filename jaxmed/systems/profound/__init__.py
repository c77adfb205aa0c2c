"""ProFound: foundation models of prostate MRI, and what image quality does to how few labels they need.

Papers: "ProFound: a moderate-sized vision foundation model for multi-task prostate imaging", arXiv:2603.03961; "Impact
of Clinical Image Quality on Efficient Foundation Model Finetuning", arXiv:2508.11864.

In:  prostate MRI as one file or DICOM folder per sequence: T2w, DWI of a high b-value, ADC. A case is the T2w scan,
     named t2w (CASE_t2w), with hbv or dwi and adc beside it, or the folder of them; --preprocess.sequences names them
     otherwise. A CSV manifest has the column path (the T2w scan or the folder) and for labelled work label, subject and
     split (train, validation, test), and quality (PI-QUAL 1 to 5, version 2 of it 1 to 3, or true and false). The
     sequences are brought onto the grid of the first by their affines, then to 1 x 0.5 x 0.5 mm (slice, row, column),
     cut or filled with zeros to 64 x 224 x 224 voxels about the centre; each is standardised over what is not 0. One
     that is missing is refused, or a channel of zeros (--preprocess.missing zero); one without a name is never looked
     for (--preprocess.sequences t2w "" "").
     For segmentation a column names label maps: whole numbers on the grid of the T2w scan, 0 the background.
Out: a pre-trained model; classifiers, regressors and segmenters; probabilities, maps of what moved them and label maps
     on the grid of the T2w scan; a score of every file; a report of how many good images fine-tuning needs.

Stages:
  1. jaxmed profound pretrain --input FOLDER --out runs/fcmae
     hide 60 % of the patches, learn to fill them in: a 3D ConvNeXt V2, or a transformer (--encoder transformer).
  2. jaxmed profound adapt --data.manifest cases.csv --weights runs/fcmae/outputs/model --out runs/task
     fine-tune on labels (PI-RADS, Gleason, a volume), or train the head alone (--mode frozen).
  3. jaxmed profound segment --data.manifest cases.csv --weights runs/fcmae/outputs/model --out runs/zones
     learn label maps (column mask: gland, zones, lesions) by UPerNet on the encoder; Dice and 95 % Hausdorff distance.
  4. jaxmed profound predict --input FOLDER --weights runs/task/outputs/model --out runs/prediction
     probabilities, and a map of what moved them; of a segmenter's weights label maps.
  5. jaxmed profound quality --input FOLDER --out runs/quality
     noise, SNR, CNR, resolution, ghosts, motion and distortion of every file without a reference, and one score; its
     agreement with given labels.
  6. jaxmed profound quality-study --data.manifest cases.csv --weights FILE --out runs/study
     share of high quality in fine-tuning x in testing x labels x pre-trained or from scratch x seed: heat maps, what a
     mismatch costs, labels saved, from which share of good images pre-training helps, and that in words.

Published weights: jaxmed weights list says where they are; every --weights takes their files, those of sparse
pre-training included.
Try it without data:  jaxmed profound pretrain --preset smoke --out runs/profound

Deviations from the released code: hidden patches are zeros that every operation leaves at zero, so that no library for
sparse convolutions is needed; scans are resampled here, where the release expects files that are; in adapt, the cut
before training is about the centre, not random, and classes are balanced by weights of the loss, not by drawing; in
segment, turn and zoom are drawn together, in half of the cases; ConvMAE and the decoder in UNETR's manner are not here.
--match-release takes the norm of responses over the whole batch, and scrambles the positions of a transformer, as the
release does. The quality study's grid and sizes are our own, for its are not public.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxmed.systems.profound.scoring import quality as quality


def __getattr__(name: str) -> object:
    """Import a Python call when it is used: `jaxmed profound` must not wait for jax."""
    import importlib

    homes = {"quality": "scoring"}
    if name in homes:
        return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
    raise AttributeError(name)
