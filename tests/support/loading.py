"""A source and a transform that worker processes can import."""

import dataclasses

import numpy as np

from jaxmed.errors import InputError


@dataclasses.dataclass(frozen=True)
class CountingSource:
    count: int
    broken: int = -1

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.broken:
            raise InputError(self.name(index), "a whole file", "a damaged one")
        return {"value": np.full(3, index, np.float32)}

    def name(self, index):
        return f"scan-{index}.nii.gz"


def draw(fields, generator):
    return {"value": fields["value"], "draw": generator.random(2)}


def refuse(fields, generator):
    raise InputError("image", "a spread of intensities", "8 voxels of one value")
