"""Batches for training and evaluation, read ahead by Grain.

The global batch of step s holds positions s * B to (s + 1) * B - 1 of the stream of all epochs (`records.record_at`),
and process p of n reads its p-th n-th. Workers and threads only decide who reads a record, never which: the stream is
one list for any number of workers, processes and devices, and to resume it takes only the step. Nothing of Grain's
state is saved.

With `num_workers` above 0 records are read and transformed in other processes, which are started afresh: a script
needs the usual `if __name__ == "__main__":`, and the source and the transform must pickle. Decompression and NumPy
leave Python's lock, so threads (`num_workers` 0) often do as well and start at once.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import grain
import numpy as np
from absl import flags
from jaxtyping import Shaped

from jaxmed.config import Seed, Size, Threads, Workers, checked
from jaxmed.data.records import Source, record_at, record_seed
from jaxmed.errors import InputError

Fields: TypeAlias = dict[str, Any]
Transform: TypeAlias = Callable[[Fields, np.random.Generator], Fields]
Batch: TypeAlias = dict[str, Shaped[np.ndarray, "batch ..."]]
ENDLESS = 2**48  # records; a stream has to have some length


@dataclasses.dataclass(frozen=True)
@checked
class LoaderConfig:
    """How records become batches.

    Attributes:
        batch_size: Records of a step, over all processes.
        seed: Seed of the order and of the records' random numbers.
        shuffle: Whether each epoch has an order of its own.
        drop_remainder: Whether an epoch ends with its last whole batch; else its tail and the head of the next epoch
            share a batch.
        num_workers: Processes that read; 0 reads in threads of this process.
        num_threads: Threads that read where there are no workers.
        prefetch: Batches read ahead, which is host memory.
    """

    batch_size: Size = 8
    seed: Seed = 0
    shuffle: bool = True
    drop_remainder: bool = False
    num_workers: Workers = 0
    num_threads: Threads = 2
    prefetch: Threads = 2


def make_loader(
    source: Source,
    transform: Transform,
    config: LoaderConfig,
    process_index: int = 0,
    process_count: int = 1,
) -> Callable[[int], Iterator[Batch]]:
    """Prepare the training stream.

    Args:
        source: The records.
        transform: A record's fields and its own random numbers to arrays of one shape for all records.
        config: Batch size and order.
        process_index: Which share this process reads.
        process_count: Number of shares.

    Returns:
        `batches(start_step)`, the endless stream of this process's shares from a step on. Each batch also holds
        "record", the numbers of its records. Close the iterator to stop its threads and processes.

    Raises:
        InputError: When the batch does not divide over the processes or is larger than an epoch with
            `drop_remainder`; while iterating, when a record is broken (its file is named).
    """
    share = _share(config, process_index, process_count)
    epoch_length = len(source)
    if config.drop_remainder:
        epoch_length -= epoch_length % config.batch_size
        if not epoch_length:
            found = f"{config.batch_size} for {len(source)} records"
            raise InputError("batch_size", "at most the number of records", found, "or keep the remainder")

    def batches(start_step: int = 0) -> Iterator[Batch]:
        first = start_step * config.batch_size + process_index * share
        read = functools.partial(_read_training, source, transform, config, epoch_length, share, first)
        return _stream(read, ENDLESS, share, config)

    return batches


def evaluation_batches(
    source: Source,
    transform: Transform,
    config: LoaderConfig,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Read every record once, in order, in batches of one shape.

    Args:
        source: The records.
        transform: As for training; its random numbers are those of epoch 0.
        config: Batch size and workers; order and remainder play no part.
        process_index: Which share this process reads.
        process_count: Number of shares.

    Returns:
        Equally many batches on every process. "weight" is 1 for a record and 0 for the padding of the last batch,
        which repeats records so that its numbers are ordinary ones; "record" is -1 there. Sums over all processes
        that are weighted by it count every record once.
    """
    share = _share(config, process_index, process_count)
    num_batches = -(-len(source) // config.batch_size)
    read = functools.partial(_read_evaluation, source, transform, config, share, process_index * share)
    return _stream(read, num_batches * share, share, config)


def _share(config: LoaderConfig, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index: expected 0 to {process_count - 1}, found {process_index}")
    if config.batch_size % process_count:
        raise InputError("batch_size", f"a multiple of the {process_count} processes", config.batch_size)
    return config.batch_size // process_count


def _read_training(
    source: Source, transform: Transform, config: LoaderConfig, epoch_length: int, share: int, first: int, item: int
) -> Fields:
    position = first + item // share * config.batch_size + item % share
    place = record_at(config.seed, position, len(source), shuffle=config.shuffle, epoch_length=epoch_length)
    generator = record_seed(config.seed, place.epoch, place.record)
    return {**_read(source, transform, generator, place.record), "record": np.int64(place.record)}


def _read_evaluation(
    source: Source, transform: Transform, config: LoaderConfig, share: int, first: int, item: int
) -> Fields:
    position = first + item // share * config.batch_size + item % share
    record, is_real = position % len(source), position < len(source)
    fields = _read(source, transform, record_seed(config.seed, 0, record), record)
    return {**fields, "record": np.int64(record if is_real else -1), "weight": np.float32(is_real)}


def _read(source: Source, transform: Transform, generator: np.random.Generator, record: int) -> Fields:
    fields = source[record]
    try:
        result = transform(fields, generator)
    except InputError as error:
        # A transform sees arrays and cannot know the file.
        raise InputError(f"{source.name(record)}: {error.where}", error.expected, error.found, error.advice) from error
    except Exception as error:
        error.add_note(f"while transforming record {record}, {source.name(record)}")
        raise
    taken = {"record", "weight"} & set(result)
    if taken:
        raise ValueError(f"transform: expected other field names than {sorted(taken)}, which the loader adds")
    return {name: np.asarray(value) for name, value in result.items()}


def _stream(read: Callable[[int], Fields], count: int, share: int, config: LoaderConfig) -> Iterator[Batch]:
    """Read items 0 to count - 1 in order, ahead of their use, and stack them."""
    ahead = config.prefetch * share
    records = grain.MapDataset.range(count).map(read)
    if config.num_workers:
        if not flags.FLAGS.is_parsed():
            # Grain's worker processes ask absl for debugging flags, which nobody here sets.
            flags.FLAGS.mark_as_parsed()
        buffer = -(-ahead // config.num_workers)
        stream = iter(
            records.to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(
                grain.MultiprocessingOptions(config.num_workers, buffer)
            )
        )
    else:
        stream = iter(records.to_iter_dataset(grain.ReadOptions(config.num_threads, max(ahead, config.num_threads))))
    try:
        while items := list(itertools.islice(stream, share)):
            yield _stack(items)
    finally:
        stream.close()


def _stack(items: list[Fields]) -> Batch:
    first = items[0]
    for item in items[1:]:
        if item.keys() != first.keys():
            raise ValueError(f"transform: expected the fields {sorted(first)} of every record, found {sorted(item)}")
        for name, value in item.items():
            if (value.shape, value.dtype) != (first[name].shape, first[name].dtype):
                raise InputError(
                    f"field '{name}' of records {first['record']} and {item['record']}",
                    "one shape and type for all records",
                    f"{first[name].dtype} {first[name].shape} and {value.dtype} {value.shape}",
                    "bring all to one size, with a crop or by resampling",
                )
    return {name: np.stack([item[name] for item in items]) for name in first}
