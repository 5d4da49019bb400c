"""How often the host asks the device at run #3's size: on a fast card that is what takes the time.

The limits lie a little above what is counted; `launches.py` prints the counts.
"""

from __future__ import annotations

import pytest
from null_cuda.launches import of_a_frame, of_a_step

# Of a micro-batch, of an update and of a step of six micro-batches and the update.
MOST = {"eager": (1_920, 400, 11_900), "compiled": (950, 400, 6_600), "graphs": (170, 400, 1_500)}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", MOST)
def test_a_step_launches_no_more_than_it_did_and_waits_once(mode):
    counts = of_a_step(mode)
    for (part, found), most in zip(counts.items(), MOST[mode], strict=True):
        assert 0 < found.launches <= most, part
    assert counts["step"].syncs == 1


def test_a_drawn_frame_with_depth_is_one_graph():
    assert of_a_frame(compiled=False).launches <= 1_300
    in_graph = of_a_frame(compiled=True)
    assert in_graph.graphs == 1
    assert in_graph.launches <= 10
    assert in_graph.syncs == 0
