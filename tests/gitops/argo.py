"""Argo CD's side: runs the Lua of ``examples/gitops/argocd/argocd-cm.yaml`` as Argo CD does.

Argo CD runs it on gopher-lua, which is Lua 5.1, with the base, package and table libraries and nothing else (argo-cd, util/lua/lua.go): no
``string``, not even behind the colon of a string. The same is taken away here.
"""

from pathlib import Path
from typing import Any

import lupa.lua51
import yaml

from finetune_api import contract

CONFIGURATION = Path(__file__).parents[2] / "examples/gitops/argocd/argocd-cm.yaml"
_KIND = f"{contract.GROUP}_{contract.KIND}"
_NOT_IN_ARGO = "getmetatable('').__index = nil; string, math, io, os, debug, coroutine = nil"


def _data(what: str) -> str:
    value: str = yaml.safe_load(CONFIGURATION.read_text())["data"][f"resource.customizations.{what}.{_KIND}"]
    return value


def health(job: dict[str, Any]) -> tuple[str, str]:
    """Return the status that Argo CD shows for a job, and the message."""
    told = _run(_data("health"), job)
    return told["status"], told["message"]


def actions(job: dict[str, Any]) -> set[str]:
    """Return the actions that Argo CD offers for a job."""
    found = _run(yaml.safe_load(_data("actions"))["discovery.lua"], job)
    return {name for name, action in found.items() if not action["disabled"]}


def act(action: str, job: dict[str, Any]) -> dict[str, Any]:
    """Return the job as Argo CD would write it after an action."""
    definitions = yaml.safe_load(_data("actions"))["definitions"]
    (definition,) = [each for each in definitions if each["name"] == action]
    changed: dict[str, Any] = _run(definition["action.lua"], job)
    return changed


def _run(program: str, job: dict[str, Any]) -> Any:
    runtime = lupa.lua51.LuaRuntime(register_eval=False, register_builtins=False)
    runtime.execute(_NOT_IN_ARGO)
    runtime.globals()["obj"] = runtime.table_from(job, recursive=True)
    return _value(runtime.execute(program))


def _value(value: Any) -> Any:
    if lupa.lua51.lua_type(value) != "table":
        return value
    items = dict(value)
    if items and set(items) == set(range(1, len(items) + 1)):
        return [_value(item) for item in items.values()]
    return {key: _value(item) for key, item in items.items()}
