"""What kstatus makes of an object: the rules by which kpt, Flux, Argo CD's plugins and ``kubectl wait`` users judge a custom resource.

A port of the generic rules of sigs.k8s.io/cli-utils, pkg/kstatus/status (generic.go, status.go; ``checkReadyCondition`` is its newer
versions'). Conditions are looked at in their order: the first of Reconciling and Stalled that is True decides.
"""

from typing import Any

TERMINATING, IN_PROGRESS, FAILED, CURRENT = "Terminating", "InProgress", "Failed", "Current"


def compute(body: dict[str, Any]) -> str:
    """Return the status of an object as the API server holds it."""
    metadata, status = body["metadata"], body.get("status", {})
    if metadata.get("deletionTimestamp"):
        return TERMINATING
    if "observedGeneration" in status and status["observedGeneration"] != metadata["generation"]:
        return IN_PROGRESS
    conditions = status.get("conditions", [])
    for condition in conditions:
        if (condition["type"], condition["status"]) == ("Reconciling", "True"):
            return IN_PROGRESS
        if (condition["type"], condition["status"]) == ("Stalled", "True"):
            return FAILED
    ready = next((condition["status"] for condition in conditions if condition["type"] == "Ready"), "True")
    return CURRENT if ready == "True" else IN_PROGRESS


def check(body: dict[str, Any]) -> None:
    """Require that a job's conditions contradict neither one another nor its phase, by these rules."""
    status = body["status"]
    holds = {condition["type"] for condition in status["conditions"] if condition["status"] == "True"}
    is_unknown = any(
        (condition["type"], condition["status"]) == ("Ready", "Unknown") for condition in status["conditions"]
    )
    assert len(holds & {"Ready", "Reconciling", "Stalled"}) == (not is_unknown), (
        "one of the three, unless nobody is heard"
    )
    assert not {"Complete", "Failed"} <= holds
    assert status["observedGeneration"] <= body["metadata"]["generation"]
    judged = compute(body)
    if judged == TERMINATING or status["observedGeneration"] != body["metadata"]["generation"]:
        return
    phase = status["phase"]
    assert ("Complete" in holds, "Failed" in holds) == (phase == "Succeeded", phase == "Failed")
    if phase in ("Succeeded", "Running", "Suspended"):
        reasons = {condition["reason"] for condition in status["conditions"] if condition["type"] in holds}
        under_way = phase == "Suspended" or "Resizing" in reasons or is_unknown
        assert judged == CURRENT or (judged == IN_PROGRESS and under_way), (phase, judged)
    elif phase == "Failed":
        assert judged == FAILED
    else:
        assert judged in (IN_PROGRESS, FAILED), (phase, judged)
