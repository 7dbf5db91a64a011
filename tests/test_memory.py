"""What a million items take beyond the weights, searched and evaluated in a process of its own."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
SIZES, RANKS = (20_000, 180_000, 800_000), (64, 16, 4)

PEAK = """
import torch
from tests.test_memory import million, peak_mib
"""

SEARCH = (
    PEAK
    + """
from cprec_recbole import FullSoftmax, TreeSoftmax
hidden = torch.randn(64, 64)
for kind in (FullSoftmax, TreeSoftmax):
    head = kind(million())
    head.topk(hidden[:1], 20, exclude=torch.ones(1, 1, dtype=torch.int64))  # compiles, once
    if kind is TreeSoftmax:
        head.build_index()
    used = peak_mib(lambda: head.topk(hidden, 20, exclude=torch.randint(1, 10**6, (64, 50))))
    print(kind.__name__, round(used))
    assert used < 128, used
"""
)

EVALUATE = (
    PEAK
    + """
import sys
from pathlib import Path
from recbole.data.interaction import Interaction
from cprec_recbole.softmax import build_softmax
from cprec_recbole.training.trainer import CompressedTrainer
from tests.builders import World

world = World.made_up(Path(sys.argv[1]))
config = world.config("CpSASRec", hidden_size=64, n_heads=2, eval_batch_size=1024)
config["checkpoint_dir"] = sys.argv[1]
train, _, _ = world.loaders(config)
from recbole.utils import get_model
model = get_model("CpSASRec")(config, train._dataset).eval()
model.inner.item_embedding, model.n_items = million(), 10**6
rows = config["eval_batch_size"]
users = Interaction({
    model.ITEM_SEQ: torch.randint(1, 10**6, (rows, 8)),
    model.ITEM_SEQ_LEN: torch.full((rows,), 8),
})
model.softmax = build_softmax("full", model.table)
trainer = CompressedTrainer(config, model)

@torch.no_grad()
def evaluate():
    batch = users, None, torch.arange(rows), torch.randint(1, 10**6, (rows,))
    _, scores, positive_u, positive_i = trainer._full_sort_batch_eval(batch)
    trainer.eval_collector.eval_batch_collect(scores, users, positive_u, positive_i)

used = peak_mib(evaluate)
print(round(used))
assert used < 512, used
assert len(trainer.eval_collector.get_data_struct()["rec.topk"]) == rows
"""
)


def million():
    """A table of a million items with random weights."""
    from tests.builders import block_embedding

    return block_embedding(SIZES, RANKS, 64)


def peak_mib(action):
    """MiB that the process grows by while something runs."""

    def reading(field):
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024

    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed before must not hide what is needed now
    before = reading("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    action()
    return reading("VmHWM") - before


@pytest.mark.skipif(not STATUS.exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("script", [SEARCH, EVALUATE], ids=["search", "evaluate"])
def test_a_million_items_take_little_memory(script, tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
