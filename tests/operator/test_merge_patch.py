"""RFC 7386, both ways: the patch from one document to another, applied, gives the other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.merge_patch import merge_patch
from tests.operator.fake_api import apply_merge_patch

names = st.text("abc", min_size=1, max_size=2)
values = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(names, values, max_size=4)


@given(documents, documents)
def test_a_patch_applied_to_the_old_document_gives_the_new_one(old: dict, new: dict) -> None:
    assert apply_merge_patch(old, merge_patch(old, new)) == new


@given(documents)
def test_nothing_differs_from_itself(document: dict) -> None:
    assert merge_patch(document, document) == {}


PATCHES = {
    "what is new is added": ({}, {"a": 1}, {"a": 1}),
    "what is gone becomes null": ({"a": 1}, {}, {"a": None}),
    "lists are replaced whole": ({"a": [1, 2]}, {"a": [1]}, {"a": [1]}),
    "only what differs inside is named": ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, {"a": {"c": 3}}),
    "an object that replaces a value is told whole": ({"a": 1}, {"a": {"b": 1}}, {"a": {"b": 1}}),
    "an empty object is something": ({}, {"a": {}}, {"a": {}}),
}


@pytest.mark.parametrize(("old", "new", "patch"), PATCHES.values(), ids=PATCHES.keys())
def test_patches(old: dict, new: dict, patch: dict) -> None:
    assert merge_patch(old, new) == patch
    assert apply_merge_patch(old, patch) == new
