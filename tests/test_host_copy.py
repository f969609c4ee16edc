"""Numbers on their way to the host, here without a device to come from."""

import pytest
import torch

from kfac_fast.host_copy import HostCopy


class Event:
    """Stands for the event after a copy."""

    def __init__(self, arrived: bool) -> None:
        self.arrived = arrived
        self.queries = 0

    def query(self) -> bool:
        self.queries += 1
        return self.arrived


def test_the_latest_number_arrives() -> None:
    copy = HostCopy()
    assert copy.read() is None
    for number in (3, 2**40):
        copy.send(torch.tensor(number))
        assert copy.read() == number


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("arrived", [False, True])
def test_nobody_asks_for_it_while_a_graph_is_captured(
    arrived: bool, capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    copy = HostCopy()
    copy.send(torch.tensor(7))
    copy._arrived = event = Event(arrived)
    assert copy.read() == (7 if arrived and not capturing else None)
    assert event.queries == (not capturing)
