"""TANGERINE: a 3D masked autoencoder for chest CT, and what grows on it.

Paper: "TANGERINE: a 3D masked-autoencoder foundation model for low-dose chest CT", arXiv:2507.01881.

In:  chest CTs in HU: NIfTI files, DICOM folders, or .npz cubes with an array "volume" in [0, 1]; a CSV manifest with
     the column path, and for labelled work label, subject and split (train, validation, test). Volumes are read in
     stored axes as (slice, row, column), resampled over their whole field of view to a cube, and HU from -1200 to 800
     become 0 to 1. Nothing is cropped.
Out: a pre-trained model, adapted classifiers or regressors, embeddings, probabilities, and maps on the input's grid.

Stages:
  1. jaxmed tangerine pretrain --input FOLDER --out runs/mae
     hide 75 % of the patches, learn to fill them in; no labels.
  2. jaxmed tangerine adapt --data.manifest scans.csv --weights runs/mae/outputs/model --out runs/task
     fine-tune or probe on labels; AUROC with intervals, external sets.
  3. jaxmed tangerine embed --input FOLDER --weights runs/mae/outputs/model --out runs/features
     features of every volume as CSV and NPZ.
  4. jaxmed tangerine predict --input FOLDER --weights runs/task/outputs/model --out runs/prediction
     probabilities, and a map of what moved them, on the grid of each input.
  5. jaxmed tangerine efficiency --data.manifest scans.csv --weights runs/mae/outputs/model --out runs/study
     label fractions x seeds, pre-trained against from scratch.

Published weights (CC-BY-NC 4.0): jaxmed weights list says where they are; every --weights takes their .pth file.
Try it without data:  jaxmed tangerine pretrain --preset smoke --out runs/tangerine

Deviations from the released code: weights that do not cover the encoder are an error (it loads what fits and says
nothing); fewer than half the voxels along an axis (upsampling by two or more) repeat the edge instead of 0 HU;
accumulation averages gradients; positions of grids that are no cube are not scrambled; each process reads its own
share.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxmed.recipes.encoder_calls import predict as predict
    from jaxmed.systems.tangerine.embedding import embed as embed
    from jaxmed.systems.tangerine.embedding import embed_cubes as embed_cubes


def __getattr__(name: str) -> object:
    """Import a Python call when it is used: `jaxmed tangerine` must not wait for jax."""
    if name in ("embed", "embed_cubes"):
        from jaxmed.systems.tangerine import embedding

        return getattr(embedding, name)
    if name == "predict":
        from jaxmed.recipes.encoder_calls import predict

        return predict
    raise AttributeError(name)
