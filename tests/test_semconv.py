"""The pinned names: well formed, unique, and not at odds with the conventions."""

from __future__ import annotations

import re
import sys

from tracer import semconv

NAMES = {
    key: value
    for key, value in vars(semconv).items()
    if key.isupper() and isinstance(value, str) and "." in value and not key.endswith("PREFIX") and "://" not in value
}


def test_names_are_lowercase_dotted_and_unique() -> None:
    assert all(re.fullmatch(r"[a-z_]+(\.[a-z][a-z0-9_]*)+", value) for value in NAMES.values())
    assert len(set(NAMES.values())) == len(NAMES)


def test_no_name_is_also_a_namespace() -> None:
    names = set(NAMES.values())
    assert not [name for name in names for other in names if other.startswith(name + ".")]


def test_only_known_namespaces_are_used() -> None:
    assert {value.split(".")[0] for value in NAMES.values()} == {
        "error",
        "exception",
        "gen_ai",
        "host",
        "http",
        "service",
        "tensorspan",
    }


def test_request_names_are_among_the_suffixes() -> None:
    for value in (semconv.REQUEST_MAX_TOKENS, semconv.REQUEST_CHOICE_COUNT):
        assert value.removeprefix(semconv.REQUEST_PREFIX) in semconv.REQUEST_SUFFIXES


def test_everything_is_exported_and_nothing_third_party_is_imported() -> None:
    public = [key for key in vars(semconv) if key.isupper()]
    assert sorted(public) == semconv.__all__
    modules = [value.__name__ for value in vars(semconv).values() if type(value) is type(sys)]
    assert modules == []
