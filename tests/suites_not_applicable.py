"""
The tests of transformers' common suites that do not apply to this package: by suite, reason and name. Names may end in
a `*` where the suite makes a series of tests out of one. Every entry has to fail or be skipped by the suite itself, and
every other test has to pass.
"""

NOT_APPLICABLE: dict[str, dict[str, list[str]]] = {}
