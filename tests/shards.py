"""``pytest -p tests.shards --shards 14 --shard 3 --record FILE``: a share of the tests, and what came of each.

For tools/gpu_check.py, whose processes may end before their tests do: by an error that takes the GPU from a process,
by a test that waits for ever, or because the minutes are over. FILE has a line when a test begins and one when it ends,
and tests that are in it are not begun again, so that the next process goes on behind the one that broke off.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

BEGUN, DONE = "begun", "done"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shards", type=int, default=1)
    parser.addoption("--shard", type=int, default=0)
    parser.addoption("--record", type=Path)


def read(record: Path) -> dict[str, str]:
    """The outcome of every test in it; of one that has none, that it was begun."""
    lines = record.read_text().splitlines() if record.exists() else []
    return {name: outcome for outcome, _, name in (line.partition("\t") for line in lines)}


def keep_passed(record: Path) -> None:
    """So that what did not pass in an earlier session is begun again."""
    passed = {name: outcome for name, outcome in read(record).items() if outcome in ("passed", "skipped")}
    record.write_text("".join(f"{outcome}\t{name}\n" for name, outcome in passed.items()))


class Record:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.before = read(file)

    def write(self, outcome: str, name: str) -> None:
        with self.file.open("a") as file:
            file.write(f"{outcome}\t{name}\n")

    @pytest.hookimpl(trylast=True)  # after what leaves tests out by marks
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        shards, shard = config.getoption("--shards"), config.getoption("--shard")
        items[:] = [
            item
            for item in items
            if zlib.crc32(item.nodeid.encode()) % shards == shard and item.nodeid not in self.before
        ]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(BEGUN, nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed or report.skipped:
            self.write(report.outcome, report.nodeid)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            self.write(DONE, DONE)


def pytest_configure(config: pytest.Config) -> None:
    if (file := config.getoption("--record")) is not None:
        config.pluginmanager.register(Record(file))
