"""Few lines, however many faults."""

import pytest

from paramserver.transport.complaints import INTERVAL, MAX_KINDS, Complaints


class Log:
    """Complaints, the lines that they have written, and a clock."""

    def __init__(self):
        self.now = 0.0
        self.lines = []
        self.complaints = Complaints(self.lines.append, lambda: self.now)


@pytest.fixture
def log():
    return Log()


def test_the_first_fault_of_each_kind_is_told_at_once(log):
    log.complaints.add("token", "a wrong token")
    log.complaints.add("silence", "nothing was said")
    assert log.lines == ["a wrong token", "nothing was said"]


def test_a_kind_has_one_line_a_minute_with_the_number_of_the_others(log):
    for second in range(200):
        log.now = float(second)
        log.complaints.add("token", f"at {second}")
    more = "(and 59 more like this since the last line about it)"
    assert log.lines == ["at 0", f"at 60 {more}", f"at 120 {more}", f"at 180 {more}"]


def test_after_a_quiet_minute_a_fault_is_told_alone(log):
    log.complaints.add("token", "once")
    log.now = INTERVAL
    log.complaints.add("token", "again")
    assert log.lines == ["once", "again"]


def test_no_number_of_kinds_fills_the_memory_or_the_log(log):
    for kind in range(10 * MAX_KINDS):
        log.complaints.add(f"kind {kind}", f"fault {kind}")
    assert len(log.lines) == MAX_KINDS + 1
    assert len(log.complaints._kinds) == MAX_KINDS + 1
