import itertools
import multiprocessing
import threading

import numpy as np
import pytest
from loading import CountingSource, draw, refuse

from jaxmed.data.loader import LoaderConfig, evaluation_batches, make_loader
from jaxmed.data.records import FileSource, epoch_order
from jaxmed.errors import InputError
from jaxmed.io import nifti
from jaxmed.volume import Volume

SOURCE = CountingSource(10)


def take(config, count, start=0, process_index=0, process_count=1, source=SOURCE):
    stream = make_loader(source, draw, config, process_index, process_count)(start)
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def joined(batches, name):
    return np.concatenate([batch[name] for batch in batches])


@pytest.mark.core
def test_epochs_follow_one_another_without_a_gap():
    records = joined(take(LoaderConfig(batch_size=4, seed=2), 5), "record")
    assert records.tolist() == [*epoch_order(2, 0, 10), *epoch_order(2, 1, 10)]


@pytest.mark.core
def test_the_remainder_is_dropped_on_request():
    records = joined(take(LoaderConfig(batch_size=4, seed=2, drop_remainder=True), 4), "record")
    assert records.tolist() == [*epoch_order(2, 0, 10)[:8], *epoch_order(2, 1, 10)[:8]]
    with pytest.raises(InputError, match="16 for 10 records"):
        make_loader(SOURCE, draw, LoaderConfig(batch_size=16, drop_remainder=True))


@pytest.mark.core
def test_batches_hold_their_records():
    batch = take(LoaderConfig(batch_size=4), 1)[0]
    assert batch["value"].shape == (4, 3) and batch["draw"].shape == (4, 2)
    np.testing.assert_array_equal(batch["value"][:, 0], batch["record"])


@pytest.mark.core
@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_one_stream(process_count):
    config = LoaderConfig(batch_size=8, seed=7)
    whole = take(config, 6)
    shares = [take(config, 6, 0, index, process_count) for index in range(process_count)]
    for step, batch in enumerate(whole):
        for name, value in batch.items():
            parts = np.concatenate([share[step][name] for share in shares])
            np.testing.assert_array_equal(parts, value)


@pytest.mark.core
@pytest.mark.parametrize(("process_index", "process_count"), [(0, 1), (1, 2)])
def test_a_restart_continues_the_stream(process_index, process_count):
    config = LoaderConfig(batch_size=6, seed=1, num_threads=3)
    whole = take(config, 9, 0, process_index, process_count)
    rest = take(config, 4, 5, process_index, process_count)
    for ours, theirs in zip(rest, whole[5:], strict=True):
        for name, value in ours.items():
            np.testing.assert_array_equal(value, theirs[name])


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_change_nothing(num_workers):
    config = LoaderConfig(batch_size=6, seed=3)
    alone = take(config, 5, 2)
    shared = take(LoaderConfig(batch_size=6, seed=3, num_workers=num_workers), 5, 2)
    for ours, theirs in zip(shared, alone, strict=True):
        for name, value in ours.items():
            np.testing.assert_array_equal(value, theirs[name])
    assert not multiprocessing.active_children()


@pytest.mark.multiprocess
def test_workers_name_a_broken_file():
    stream = make_loader(CountingSource(10, broken=4), draw, LoaderConfig(batch_size=10, num_workers=1))(0)
    with pytest.raises(InputError, match="scan-4.nii.gz: expected a whole file"):
        next(stream)
    assert not multiprocessing.active_children()


@pytest.mark.core
def test_every_record_draws_its_own_numbers_in_every_epoch():
    draws = joined(take(LoaderConfig(batch_size=10), 2), "draw")
    assert len(np.unique(draws)) == 40


@pytest.mark.core
def test_a_broken_file_is_named(tmp_path):
    paths = tuple(tmp_path / f"{number}.nii.gz" for number in range(2))
    for path in paths:
        nifti.write(path, Volume.make(np.zeros((4, 4, 4), np.int16), np.eye(4)))
    paths[1].write_bytes(paths[1].read_bytes()[:50])
    stream = make_loader(FileSource({"image": paths}), draw, LoaderConfig(batch_size=2, shuffle=False))(0)
    with pytest.raises(KeyError, match="value") as caught:
        next(stream)
    assert caught.value.__notes__[0] == f"while transforming record 0, {paths[0]}"
    stream = make_loader(FileSource({"image": paths}), lambda fields, _: {}, LoaderConfig(batch_size=2))(0)
    with pytest.raises(InputError, match="1.nii.gz: expected a whole NIfTI file"):
        next(stream)


@pytest.mark.core
def test_a_transform_that_refuses_names_the_file():
    stream = make_loader(SOURCE, refuse, LoaderConfig(batch_size=1, shuffle=False))(0)
    with pytest.raises(InputError, match="scan-0.nii.gz: image: expected a spread"):
        next(stream)


@pytest.mark.core
def test_unequal_shapes_and_reserved_names_are_refused():
    def grow(fields, generator):
        return {"value": np.zeros(int(fields["value"][0]))}

    with pytest.raises(InputError, match="records 0 and 1: expected one shape"):
        next(make_loader(SOURCE, grow, LoaderConfig(batch_size=2, shuffle=False))(0))
    with pytest.raises(ValueError, match="'weight'"):
        next(make_loader(SOURCE, lambda fields, _: {"weight": fields["value"]}, LoaderConfig())(0))


@pytest.mark.core
def test_batches_have_to_divide_over_processes():
    with pytest.raises(InputError, match="a multiple of the 3 processes"):
        make_loader(SOURCE, draw, LoaderConfig(batch_size=8), 0, 3)


@pytest.mark.core
@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 8, 10])
def test_evaluation_counts_every_record_once(process_count, count):
    source = CountingSource(count)
    shares = [
        list(evaluation_batches(source, draw, LoaderConfig(batch_size=4), index, process_count))
        for index in range(process_count)
    ]
    assert {len(share) for share in shares} == {-(-count // 4)}
    records = np.concatenate([joined(share, "record") for share in shares])
    weights = np.concatenate([joined(share, "weight") for share in shares])
    values = np.concatenate([joined(share, "value") for share in shares])
    assert sorted(records[weights == 1]) == list(range(count)) and (records[weights == 0] == -1).all()
    assert (weights * values[:, 0]).sum() == count * (count - 1) / 2
    assert {batch["value"].shape[0] for share in shares for batch in share} == {4 // process_count}


@pytest.mark.core
def test_a_closed_stream_leaves_no_reading_threads():
    stream = make_loader(SOURCE, draw, LoaderConfig(batch_size=2, num_threads=4))(0)
    next(stream)
    stream.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(5)
            assert not thread.is_alive()


@pytest.mark.core
def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="batch_size"):
        LoaderConfig(batch_size=0)
    with pytest.raises(ValueError, match="num_workers"):
        LoaderConfig(num_workers=-1)
