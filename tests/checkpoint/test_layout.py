"""What ranks wrote is read by any others, out of the files that hold it and no more."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepspeed_sdp.checkpoint import Entry, Held, Layout, Run, Section, Streamed, cut, header, layout_file, whole
from deepspeed_sdp.checkpoint.layout import check_cover, read_layout
from deepspeed_sdp.checkpoint.tensor_files import TensorFiles, tensor_file
from deepspeed_sdp.errors import CheckpointError

KINDS = {"master": torch.float32, "optimizer.exp_avg": torch.bfloat16}


def make_buckets(owner_sets, shapes, numel):
    """Fragments of weights by owner set in turns, cut into buckets of at most so many elements: (owner set, runs)."""
    buckets = []
    for number, (name, shape) in enumerate(shapes.items()):
        rows = shape[0] if number % 2 else 1  # columns, or rows
        size = math.prod(shape) // rows
        borders = [size * i // len(owner_sets) for i in range(len(owner_sets) + 1)]
        for place, (low, high) in enumerate(itertools.pairwise(borders)):
            length = rows * (high - low)
            for start in range(0, length, numel):
                run = Run(name, shape, rows, low, high - low, start, min(start + numel, length))
                buckets.append(((place + number) % len(owner_sets), (run,)))
    return buckets


def make_layouts(owner_sets, replicas, buckets, copies=1):
    """The layout of every worker: rank ``worker * replicas + i`` is replica ``i``."""

    def ranks(owners, copy):
        turned = owners[copy:] + owners[:copy]
        return tuple(worker * replicas + i for i in range(replicas) for worker in turned)

    owners = [tuple(ranks(list(workers), copy) for copy in range(copies)) for workers in owner_sets]
    layouts = {}
    for worker in sorted({worker for workers in owner_sets for worker in workers}):
        held = []
        for owner_set, runs in buckets:
            if worker in owner_sets[owner_set]:
                numel, shards = sum(run.numel for run in runs), len(owners[owner_set][0])
                held.append(Held(owner_set, runs, -(-numel // shards)))
        layouts[worker] = Layout(owners, [Section(KINDS, held)])
    return layouts


def value_of(kind, run):
    """The elements of a run: what they are says where they belong."""
    full = torch.arange(math.prod(run.shape), dtype=torch.float32) % 251 + len(run.name) + (kind != "master")
    columns = full.view(run.rows, -1)[:, run.column : run.column + run.width]
    return columns.reshape(-1)[run.start : run.stop].to(KINDS[kind])


def write(folder, layouts, workers):
    for worker, layout in layouts.items():
        (folder / layout_file(worker)).write_text(layout.to_json())
    for rank, worker in enumerate(workers):
        layout = layouts[worker]
        head = header(layout, rank)
        pieces = []
        for copy, section, kind, _, _ in layout.tensors(rank):
            for bucket in layout.sections[section].buckets:
                ranks = layout.owners[bucket.owners][copy]
                start = ranks.index(rank) * bucket.share
                for run in cut(bucket.runs, start, start + bucket.share):
                    pieces.append(memoryview(value_of(kind, run).view(torch.uint8).numpy()))
        described = Streamed([memoryview(head), *pieces]).write(folder / tensor_file(rank))
        assert described["bytes"] == len(head) + sum(map(len, pieces))


def read(files, runs):
    """Read and compare; the files that were opened."""
    opened = []
    open_file = files._open
    files._open = lambda path: (opened.append(path.name), open_file(path))[1]
    for kind in KINDS:
        values = torch.full((sum(run.numel for run in runs),), float("nan"), dtype=KINDS[kind])
        files.fill([Entry(kind, tuple(runs), values)])
        assert torch.equal(values, torch.cat([value_of(kind, run) for run in runs]))
    return set(opened) | {layout_file(worker) for worker in files._layouts}


SHAPES = {"a": (12, 10), "b.weight": (6, 14), "c": (33,)}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_part_is_read_out_of_any_layout(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("layouts")
    workers, replicas = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    subsets = st.lists(st.integers(0, workers - 1), min_size=1, unique=True).map(sorted)
    owner_sets = data.draw(st.lists(subsets, min_size=1, max_size=4))
    copies = data.draw(st.integers(1, min(map(len, owner_sets))))
    layouts = make_layouts(
        owner_sets, replicas, make_buckets(owner_sets, SHAPES, data.draw(st.integers(5, 200))), copies
    )
    of_ranks = [rank // replicas for rank in range(workers * replicas)]
    layouts |= {worker: Layout([], []) for worker in range(workers) if worker not in layouts}
    write(folder, layouts, of_ranks)
    again = {worker: read_layout(folder, worker) for worker in layouts}
    assert {f"{kind}.{name}": shape for kind in KINDS for name, shape in SHAPES.items()} == check_cover(again.values())
    # All but one of the owners may be gone where all of them wrote copies.
    lost = set()
    if copies > 1:
        lost = {layout_file(data.draw(st.integers(0, workers - 1)))}
    others = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    wanted = make_buckets([[place] for place in others], SHAPES, data.draw(st.integers(5, 200)))
    read(TensorFiles(folder, of_ranks, lost), [run for _, runs in wanted for run in runs])
    read(TensorFiles(folder, of_ranks, lost), [whole(name, shape) for name, shape in SHAPES.items()])


WORKERS, REPLICAS = 4, 3
SETS = [(0, 1), (2, 3), (0, 2), (1, 3)]


@pytest.fixture
def saved(tmp_path):
    buckets = make_buckets(SETS, {"a": (16, 24), "b.weight": (8, 48)}, 40)
    layouts = make_layouts(SETS, REPLICAS, buckets)
    of_ranks = [rank // REPLICAS for rank in range(WORKERS * REPLICAS)]
    write(tmp_path, layouts, of_ranks)
    return tmp_path, layouts, of_ranks, buckets


def shard_runs(layout, rank):
    return [
        run
        for bucket in layout.sections[0].buckets
        for place in [layout.owners[bucket.owners][0].index(rank)]
        for run in cut(bucket.runs, place * bucket.share, (place + 1) * bucket.share)
    ]


def test_with_the_same_layout_a_rank_opens_its_own_files_alone(saved):
    folder, layouts, of_ranks, _ = saved
    for rank, worker in enumerate(of_ranks):
        opened = read(TensorFiles(folder, of_ranks, first=worker), shard_runs(layouts[worker], rank))
        assert opened == {tensor_file(rank), layout_file(worker)}


def test_with_another_layout_a_rank_opens_the_files_that_it_needs(saved):
    folder, _, of_ranks, buckets = saved
    for number, (owner_set, runs) in enumerate(buckets):
        opened = read(TensorFiles(folder, of_ranks, first=SETS[owner_set][0]), runs)
        # The owners' of what is read, and no others'.
        owners = {rank for rank, worker in enumerate(of_ranks) if worker in SETS[owner_set]}
        assert opened <= {*map(tensor_file, owners), *map(layout_file, SETS[owner_set])}, number
        one = read(TensorFiles(folder, of_ranks, first=SETS[owner_set][0]), list(cut(runs, 0, 1)))
        assert len(one) <= 3


def test_a_layout_does_not_grow_with_the_number_of_ranks():
    def size(replicas):
        layout = make_layouts(SETS, replicas, make_buckets(SETS, {"a": (512, 512), "b": (512, 512)}, 1000))[0]
        owners = Layout(layout.owners, [])
        return len(layout.to_json()) - len(owners.to_json()), len(layout.owners[0][0])

    (few, ranks), (many, more) = size(2), size(512)
    assert more == 256 * ranks
    # Shares of a bucket have fewer digits.
    assert many <= few


def test_what_is_in_lost_files_alone_is_said(saved):
    folder, _, of_ranks, buckets = saved
    files = TensorFiles(folder, of_ranks, {tensor_file(0)})
    with pytest.raises(CheckpointError, match=r"a part of master.a is in tensors-00000.safetensors alone"):
        read(files, [run for _, runs in buckets for run in runs])
