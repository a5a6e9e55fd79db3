"""What is said of a kept run that fails again and again, and when it is tried again."""

import pytest
from livediffusion.live import kept

pytestmark = pytest.mark.comfy


class TestLines:
    @pytest.fixture
    def lines(self):
        self.now = 1000.0
        return kept.Lines(lambda: self.now)

    def test_the_same_failure_is_one_line_and_its_count(self, lines):
        said = [lines.of(f"the model at 0x{i:x} is missing, try {i}") for i in range(1, 1001)]
        told = [line for line in said if line is not None]
        assert len(told) == 4
        assert told[0].endswith("try 1") and told[-1].endswith("(1000 times now)")

    def test_others_are_so_many_an_hour(self, lines):
        def words(i):
            return "".join(chr(97 + int(d)) for d in str(i))

        assert sum(lines.of(words(i)) is not None for i in range(500)) == 20
        self.now += 3601
        assert lines.of("something else") is not None

    def test_nothing_in_a_line_is_obeyed_by_a_terminal(self, lines):
        line = lines.of("a\nb\x1b[31m" + "c" * 1000)
        assert "\n" not in line and "\x1b" not in line and len(line) < 420


def test_it_is_well_again_after_ten_minutes_only():
    one = kept.Kept("r", "n", {}, None, 0.0, "s")
    pauses = []
    for now in range(9):
        one.failed("no model 7", "4", float(now))
        pauses.append(one.due - now)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60] and (one.same, one.failures) == (9, 9)
    one.alive(100.0)
    one.alive(699.0)
    assert one.failures == 9
    one.alive(700.0)
    assert (one.failures, one.reason) == (0, None)
    one.failed("another", None, 800.0)
    assert one.due == 801.0 and one.same == 1
