"""
Outcomes of transformers' common suites in pytest: a test that is listed as not applicable has to fail or be skipped by
the suite itself, any other has to pass, and the counts are printed at the end.

`conftest.py` imports the hooks.
"""

from collections import Counter
from collections.abc import Generator

import pytest
from suites_not_applicable import NOT_APPLICABLE

MODULE = "test_transformers_suites"

# Marks that the suites put on their tests; pytest wants to know them.
MARKS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "is_pipeline_test")
MARKS += ("is_training_test", "order", "slow", "torch_compile_test")


def pytest_configure(config: pytest.Config) -> None:
    """Makes the suites' marks known."""
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: a mark of transformers' common suites")


def reason_of(suite: str, test: str) -> str | None:
    """Why a test does not apply, or None if it does."""
    return next((reason for reason, tests in NOT_APPLICABLE.get(suite, {}).items() if test in tests), None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turns the outcome of a suite's test into the one that the list of tests that do not apply asks for."""
    report = yield
    suite = getattr(item, "cls", None)
    if item.path.stem != MODULE or suite is None:
        return report
    reason = reason_of(suite.__name__, item.name)
    if reason is None:
        if report.skipped:
            report.outcome = "failed"
            report.longrepr = f"Skipped, but not listed in suites_not_applicable.py: {report.longrepr}"
    elif report.when == "call" and report.passed:
        report.outcome = "failed"
        report.longrepr = f"Passes, but suites_not_applicable.py lists it: {reason}"
    elif report.when == "call" and not report.passed:
        report.outcome = "skipped"
        # Without a line, pytest's summary folds the tests of one reason into one entry.
        report.longrepr = (str(item.path), None, f"Not applicable: {reason}")
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many of the suites' tests passed and do not apply."""
    counts: dict[str, Counter[str]] = {}
    for outcome in ("passed", "skipped", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            path, *names = getattr(report, "nodeid", "").split("::")
            if path.endswith(f"{MODULE}.py") and len(names) == 2:
                counts.setdefault(names[0], Counter())[outcome] += 1
    if not counts:
        return
    terminalreporter.section("transformers' common suites")
    for suite, outcomes in [*sorted(counts.items()), ("all", sum(counts.values(), Counter()))]:
        terminalreporter.line(
            f"{suite}: {outcomes['passed']} passed, {outcomes['skipped']} not applicable, {outcomes['failed']} failed"
        )
