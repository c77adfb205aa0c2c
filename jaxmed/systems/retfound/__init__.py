"""RETFound study: generalist and specialist encoders on retina, pre-trained, adapted and compared.

Papers: "Generalist versus Specialist Vision Foundation Models for Ocular Disease and Oculomics", arXiv:2509.03421;
RETFound, Nature 2023 (622:156); DINOv2, arXiv:2304.07193; DINOv3, arXiv:2508.10104.

In:  fundus photographs or OCT slices (PNG, JPEG, TIFF); a CSV manifest with path, label, subject and split, or a folder
     of classes, root/{train,val,test}/CLASS/image. Photographs are cropped to the disc (--picture.crop disc), the
     shorter side is resized, the middle is cut out, and colours are normalised as in ImageNet.
     Weights: RETFound (masked autoencoder or DINOv2), DINOv2, DINOv3, in official, timm's or transformers' names.
Out: pre-trained encoders; classifiers or regressors with intervals; features; probabilities and maps; a table that says
     which encoder does best, with how many labels, and at what cost.

Stages:
  1. jaxmed retfound pretrain --input FOLDER --method mae|dinov2 --out runs/pretrained
     a masked autoencoder, or a student that learns from its own average.
  2. jaxmed retfound adapt --data.manifest images.csv --weights FILE --out runs/task
     fine-tune (--mode full) or probe; scores here and on --data.external sets.
  3. jaxmed retfound embed --input FOLDER --weights FILE --out runs/features
     features of every image as CSV and NPZ; --attention writes what the class token looks at, on the picture.
  4. jaxmed retfound predict --input FOLDER --weights runs/task/outputs/model --out runs/prediction
     probabilities, and a map of what moved them.
  5. jaxmed retfound compare --data.manifest images.csv --encoders retfound=A.pth dinov2=B.pth --out runs/study
     encoders x ways of adapting x shares of labels x seeds.

Published weights are gated or licensed: jaxmed weights list says where they are.
Try it without data:  jaxmed retfound compare --preset smoke --out runs/retfound

Deviations from the released code: weights that do not cover the encoder are an error (its notebook loads none and says
nothing); the layer norm of the pooled features is applied once (--match-release applies it twice, as files fine-tuned
in 2025 were).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxmed.recipes.encoder_calls import predict as predict
    from jaxmed.systems.retfound.embedding import embed as embed
    from jaxmed.systems.retfound.embedding import embed_prepared as embed_prepared


def __getattr__(name: str) -> object:
    """Import a Python call when it is used: `jaxmed retfound` must not wait for jax."""
    if name in ("embed", "embed_prepared"):
        from jaxmed.systems.retfound import embedding

        return getattr(embedding, name)
    if name == "predict":
        from jaxmed.recipes.encoder_calls import predict

        return predict
    raise AttributeError(name)
