"""The life of a job: what follows from all that is known of it, from its first pod to its last."""

from datetime import timedelta

from finetune_api.protocol import AgentState, Phase
from finetune_api.status import ConditionType, Gang, JobPhase, JobStatus
from finetune_operator.plan import spares
from finetune_operator.plan.checkpoints import after_a_generation
from finetune_operator.plan.conditions import Situation, with_conditions
from finetune_operator.plan.failure import DEVICE_ERROR, Failure, FailureClass, find_cause, lost_before_start
from finetune_operator.plan.gang import (
    choose_pods,
    grown,
    missing_pods,
    next_generation,
    next_within_reach,
    resized,
    surplus_pods,
    unfit_pods,
    with_members,
)
from finetune_operator.plan.giving_way import (
    find_reason_to_give_back,
    growth_look_again_seconds,
    look_again_seconds,
    with_growth_held,
)
from finetune_operator.plan.goodput import pause, settle
from finetune_operator.plan.hang import find_hang
from finetune_operator.plan.leaving import SILENT_SECONDS, describe, is_stuck
from finetune_operator.plan.observation import Observation, Plan, instant, is_final, soonest, timestamp, unset_gang
from finetune_operator.plan.pending import is_blocked, waiting_for
from finetune_operator.plan.progress import fold_reports
from finetune_operator.plan.recovery import (
    Hold,
    find_hold,
    last_straw,
    may_start_at,
    with_attempt,
    with_restart,
)
from finetune_operator.plan.resizing import describe_resize, find_end, told_to_stop
from finetune_operator.plan.shape import misshapen
from finetune_operator.plan.silence import find_doubt, find_loss, is_taking_stock, silence_ends_in
from finetune_operator.plan.spares import growth_to_replace, missing_spares, standing_by
from finetune_operator.plan.starting import NOT_STARTED
from finetune_operator.plan.suspects import with_suspects
from finetune_operator.views import PodView


def plan_job(observed: Observation) -> Plan:
    """Return what to do about a job now."""
    status = observed.status
    if observed.job.metadata.deletion_timestamp is not None:
        return Plan(status)  # its children go with it, by owner references
    if is_final(status):
        return _plan_finished(observed)
    if status.gang is None and observed.problem is not None:
        situation = Situation(JobPhase.PENDING, observed.problem.reason, observed.problem.message, stalled=True)
        return Plan(with_conditions(observed, status, situation))
    gang = status.gang or unset_gang(observed, 1)
    if gang.members and _has_succeeded(observed, gang):
        return _plan_members(observed, gang)  # whatever is asked of it by now, its work is done
    return _plan_deadline(observed) if _deadline_passed(observed) else _plan_gang(observed, gang)


def _plan_gang(observed: Observation, gang: Gang) -> Plan:
    """The job has work to do: have its gang do it, or leave."""
    status = observed.status
    leaving = bool(gang.members) and (
        observed.job.spec.suspend or _is_suspended(status) or _is_misshapen(observed, gang)
    )
    if leaving:
        status = fold_reports(observed, gang, status)
    if leaving and all(is_stuck(observed, pod) for pod in observed.pods):
        status, gang, leaving = after_a_generation(status, at_rest=True), next_generation(observed, gang), False
    if observed.job.spec.suspend or leaving:
        return _plan_suspended(observed, status, gang)
    resumes = _is_suspended(status)
    if resumes:
        gang = gang.model_copy(update={"mint_time": timestamp(observed.now)})  # nothing has been waited for meanwhile
    if not gang.members:
        gang = resized(observed, gang, at_rest=resumes)
    return _plan_members(observed, gang) if gang.members else _plan_assembly(observed, status, gang)


def _plan_members(observed: Observation, gang: Gang) -> Plan:
    """The gang has its members: follow them until all have succeeded or one has failed."""
    status = fold_reports(observed, gang, observed.status)
    states = _states(observed, gang)
    if _has_succeeded(observed, gang):
        return _plan_end(observed, status, gang, Situation(JobPhase.SUCCEEDED, "Succeeded", _success_message(status)))
    failure, look_again = find_cause(observed, gang) if gang.stop_time is None else find_end(observed, gang)
    if failure is None and look_again is None:
        failure, look_again = find_hang(observed, gang)
    if failure is not None:
        return _plan_failure(observed, status, gang, failure)
    silence = silence_ends_in(observed, gang, list(observed.pods))
    look_again = soonest(look_again, silence, _deadline_seconds(observed), spares.look_again_seconds(observed, gang))
    if is_taking_stock(observed, gang):  # what was known before stands until everybody could be heard
        return Plan(status, look_again_seconds=look_again)
    gang = told_to_stop(observed, _with_suspects(observed, gang, None))
    surplus = surplus_pods(observed, gang, {})  # what is held from now on is deleted once that is committed
    gang = with_growth_held(observed, gang)
    look_again = soonest(look_again, growth_look_again_seconds(observed, gang))
    ready = sum(state in (AgentState.RUNNING, AgentState.SUCCEEDED) for state in states)
    gang = gang.model_copy(update={"ready": ready, "spares": standing_by(observed, gang)})
    status = status.model_copy(update={"gang": gang})
    return Plan(
        with_conditions(observed, status, _running_situation(observed, gang, ready)),
        create=() if observed.problem else missing_spares(observed, gang),
        delete=unfit_pods(observed, gang) + surplus + growth_to_replace(observed, gang),
        look_again_seconds=look_again,
    )


def _plan_failure(observed: Observation, status: JobStatus, gang: Gang, failure: Failure) -> Plan:
    status = after_a_generation(with_attempt(observed, status, gang, failure))
    if failure.failure_class == FailureClass.TERMINAL:
        return _plan_end(observed, status, gang, Situation(JobPhase.FAILED, failure.reason, failure.message))
    last = last_straw(observed, status, failure)
    if last is not None:
        return _plan_end(observed, status, gang, Situation(JobPhase.FAILED, last.reason, last.message))
    status = with_restart(observed, status, failure)
    gang = next_within_reach(observed, _with_suspects(observed, gang, failure))
    return _plan_assembly(observed, status, gang)


def _with_suspects(observed: Observation, gang: Gang, failure: Failure | None) -> Gang:
    """Return the gang with the nodes to avoid from now on: where pods are lost or wedged, and where a device is broken."""
    losses = [(pod, find_loss(observed, gang, pod)) for pod in observed.pods]
    found = [(pod, loss.reason) for pod, loss in losses if loss is not None]
    if failure is not None and failure.reason in (DEVICE_ERROR, NOT_STARTED):
        found += [(pod, failure.reason) for pod in observed.pods if pod.name == failure.pod]
    return with_suspects(observed, gang, found)


def _plan_assembly(observed: Observation, status: JobStatus, gang: Gang) -> Plan:
    """The gang has no members yet: see that every rank has a pod, and choose them when all agents have reported."""
    gang = _with_suspects(observed, gang, None)
    not_before, hold = may_start_at(status, gang), find_hold(status, gang)
    delay = 0.0 if not_before is None else max(0.0, (not_before - observed.now).total_seconds())
    if hold is not None and hold.gives_back and delay > 0:
        return _plan_without_pods(observed, status, gang, hold, delay)
    gang = gang if delay > 0 else grown(observed, gang)
    chosen = choose_pods(observed, gang)
    lost = lost_before_start(observed, gang, chosen)
    if lost is not None:
        return _plan_failure(observed, status, gang, lost)
    complete = with_members(observed, gang, chosen)
    given_back = None if complete else find_reason_to_give_back(observed, gang, chosen, not_before)
    if given_back is not None:
        return _plan_giving_back(observed, status, gang, *given_back)
    missing = missing_pods(gang, chosen)
    problem = observed.problem if missing else None  # pods cannot be made of such a spec
    if complete is not None and delay <= 0:
        gang = complete
        status = status.model_copy(update={"start_time": status.start_time or timestamp(observed.now)})
        message = f"generation {gang.generation} is being started"
        situation = _tried_again(hold, gang) or Situation(_starting_phase(status), "Starting", message)
    elif hold is not None and delay > 0 and problem is None:
        situation = _held(hold)
    elif complete is not None:
        message = f"all pods are ready; waiting {delay:.0f} s after repeated failures"
        situation = Situation(_starting_phase(status), "BackingOff", message)
    else:
        why = problem or waiting_for(observed, chosen, gang.nodes)
        stalled = problem is not None or is_blocked(why)
        situation = Situation(_waiting_phase(status), why.reason, why.message, stalled=stalled)
    status = with_conditions(observed, status.model_copy(update={"gang": gang}), situation)
    look_again = [
        delay or None,
        None if complete else look_again_seconds(observed, gang, chosen, not_before),
        silence_ends_in(observed, gang, list(chosen.values())),
        _deadline_seconds(observed),
    ]
    return Plan(
        status,
        create=() if problem else missing,
        delete=unfit_pods(observed, gang) + surplus_pods(observed, gang, chosen),
        look_again_seconds=soonest(*look_again),
    )


def _plan_giving_back(observed: Observation, status: JobStatus, gang: Gang, reason: str, message: str) -> Plan:
    """The gang cannot be placed as a whole: it ends, and the next generation is held without pods for a while."""
    failure = Failure(FailureClass.KNOWN, reason, message, pod="", heard_at=observed.now)
    status = with_attempt(observed, status, gang, failure)
    return _plan_assembly(observed, status, next_within_reach(observed, gang))


def _plan_without_pods(observed: Observation, status: JobStatus, gang: Gang, hold: Hold, delay: float) -> Plan:
    message = f"{hold.message}; all pods are given back, next try at {timestamp(hold.retry_at)}"
    status = status.model_copy(update={"gang": gang})
    return Plan(
        with_conditions(observed, status, Situation(_waiting_phase(status), hold.reason, message)),
        delete=tuple(pod for pod in observed.pods if pod.usable),
        look_again_seconds=soonest(delay, _deadline_seconds(observed)),
    )


def _held(hold: Hold) -> Situation:
    message = f"{hold.message}; so since {hold.since}, next try at {timestamp(hold.retry_at)}"
    return Situation(JobPhase.RECOVERING, hold.reason, message, stalled=hold.needs_somebody)


def _tried_again(hold: Hold | None, gang: Gang) -> Situation | None:
    """What a gang was held for is told until it trains again: starting is not yet healing."""
    if hold is None or hold.gives_back:
        return None
    message = f"{hold.message}; so since {hold.since}, generation {gang.generation} tries again"
    return Situation(JobPhase.RECOVERING, hold.reason, message, stalled=hold.needs_somebody)


def _plan_suspended(observed: Observation, status: JobStatus, gang: Gang) -> Plan:
    """Pods are deleted first, so that their agents have the workers save; the generation ends when all are gone.

    A suspension that has begun comes to this end even if spec.suspend is false again meanwhile: pods that the operator itself deleted
    are no failure. One that nobody has seen, in which the shape of pods was changed, is made up for in the same way.
    """
    leaving = [pod for pod in observed.pods if not is_stuck(observed, pod)]
    if leaving and not observed.job.spec.suspend and misshapen(observed.job, leaving):
        message = f"{len(leaving)} pods are saving and leaving: they were made before spec asked for another shape"
        situation = Situation(JobPhase.SUSPENDED, "Reshaping", message, under_way=True)
    elif leaving:
        message = f"{len(leaving)} pods are saving and leaving"
        situation = Situation(JobPhase.SUSPENDED, "Suspending", message, under_way=True)
    else:
        situation = Situation(JobPhase.SUSPENDED, "Suspended", _suspended_message(observed.pods))
        status = pause(after_a_generation(status, at_rest=True))
    if not gang.members and any(pod.generation == gang.generation for pod in observed.pods):
        gang = next_generation(observed, gang)  # their names are taken for as long as they are there
    status = with_conditions(observed, status.model_copy(update={"gang": gang}), situation)
    delete = tuple(pod for pod in observed.pods if not pod.deleting)
    return Plan(status, delete=delete, look_again_seconds=SILENT_SECONDS if leaving else None)


def _suspended_message(stuck: tuple[PodView, ...]) -> str:
    message = "spec.suspend is true; no pod is kept"
    if not stuck:
        return message
    return f"{message}; pod {stuck[0].name} is still there: node {stuck[0].node} cannot be reached, or a finalizer holds it"


def _plan_end(observed: Observation, status: JobStatus, gang: Gang, situation: Situation) -> Plan:
    gang = gang.model_copy(update={"ready": 0})
    status = settle(observed, after_a_generation(status, at_rest=True), succeeded=situation.phase == JobPhase.SUCCEEDED)
    status = status.model_copy(update={"completion_time": timestamp(observed.now), "gang": gang})
    spec = observed.job.spec
    return Plan(
        with_conditions(observed, status, situation),
        look_again_seconds=soonest(spec.pod_ttl_seconds_after_finished, spec.ttl_seconds_after_finished),
    )


def _plan_finished(observed: Observation) -> Plan:
    """A finished job changes no more; its pods and itself go when their time has come.

    Pods that have never run go at once: they have no logs to be kept for, and no agent that ends them.
    """
    status, spec = observed.status, observed.job.spec
    ended = instant(status.completion_time) if status.completion_time else observed.now
    age = (observed.now - ended).total_seconds()
    pods_left = _left(spec.pod_ttl_seconds_after_finished, age)
    job_left = _left(spec.ttl_seconds_after_finished, age)
    members = {member.uid for member in status.gang.members} if status.gang else set()
    never_ran = {pod.uid for pod in observed.pods if pod.phase == "Pending" and pod.uid not in members}
    return Plan(
        status,
        delete=tuple(pod for pod in observed.pods if not pod.deleting and (pods_left == 0 or pod.uid in never_ran)),
        delete_job=job_left == 0,
        look_again_seconds=soonest(pods_left or None, job_left or None),
    )


def _plan_deadline(observed: Observation) -> Plan:
    status, seconds = observed.status, observed.job.spec.active_deadline_seconds
    assert status.gang is not None
    message = f"ran for longer than activeDeadlineSeconds ({seconds} s)"
    return _plan_end(observed, status, status.gang, Situation(JobPhase.FAILED, "DeadlineExceeded", message))


def _deadline_passed(observed: Observation) -> bool:
    left = _deadline_seconds(observed)
    return left is not None and left <= 0


def _deadline_seconds(observed: Observation) -> float | None:
    """Return how much of activeDeadlineSeconds is left: it begins anew after a suspension, during which none is used, as a Job's does."""
    spec, status = observed.job.spec, observed.status
    if spec.active_deadline_seconds is None or status.start_time is None or spec.suspend or _is_suspended(status):
        return None
    resumed = [one.last_transition_time for one in status.conditions if one.type == ConditionType.SUSPENDED]
    since = max(map(instant, [status.start_time, *resumed]))
    return (since + timedelta(seconds=spec.active_deadline_seconds) - observed.now).total_seconds()


def _is_suspended(status: JobStatus) -> bool:
    return any(c.type == ConditionType.SUSPENDED and c.status == "True" for c in status.conditions)


def _is_misshapen(observed: Observation, gang: Gang) -> bool:
    """Tell whether a member's pod is not in the shape that spec asks for, which it may do only while the job is suspended.

    Not before all could be heard: they may have done their work meanwhile.
    """
    if is_taking_stock(observed, gang):
        return False
    members = {member.uid for member in gang.members}
    return any(pod.uid in members for pod in misshapen(observed.job, observed.pods))


def _has_succeeded(observed: Observation, gang: Gang) -> bool:
    return all(state == AgentState.SUCCEEDED for state in _states(observed, gang))


def _states(observed: Observation, gang: Gang) -> list[AgentState]:
    """Return what each member's agent says of this generation; Idle while it has not started it."""
    said = [observed.said(gang, member) for member in gang.members]
    return [report.state if report is not None else AgentState.IDLE for report in said]


def _running_situation(observed: Observation, gang: Gang, ready: int) -> Situation:
    leaving = describe(observed, gang)
    if leaving is not None:
        return Situation(JobPhase.RECOVERING, "PodLeaving", leaving)
    doubt = find_doubt(observed, gang)
    if doubt is not None:
        phase = observed.status.phase or JobPhase.RUNNING
        return Situation(phase, doubt.reason, doubt.message, unknown=True)
    trains = ready == gang.nodes and _has_initialized(observed, gang)
    resize = describe_resize(observed, gang) if trains or gang.stop_time is not None else None
    if resize is not None:
        return Situation(JobPhase.RUNNING, "Resizing", resize, under_way=True)
    if trains:
        return Situation(JobPhase.RUNNING, "Running", f"generation {gang.generation} trains on {gang.nodes} nodes")
    message = f"generation {gang.generation}: {ready} of {gang.nodes} nodes have started"
    if ready == gang.nodes:
        message = f"generation {gang.generation}: the workers are initializing"
    return _tried_again(find_hold(observed.status, gang), gang) or Situation(
        _starting_phase(observed.status), "Starting", message
    )


def _has_initialized(observed: Observation, gang: Gang) -> bool:
    heard = observed.heard.get(gang.members[0].uid)
    beat = heard.report.heartbeat if heard else None
    if beat is None:  # a script need not tell; our trainer does
        return observed.job.spec.script is not None
    return beat.phase != Phase.INITIALIZING


def _starting_phase(status: JobStatus) -> JobPhase:
    return JobPhase.RECOVERING if any(attempt.start_time for attempt in status.attempts) else JobPhase.STARTING


def _waiting_phase(status: JobStatus) -> JobPhase:
    return JobPhase.PENDING if status.start_time is None else JobPhase.RECOVERING


def _success_message(status: JobStatus) -> str:
    steps = f"{status.progress.step} steps" if status.progress else "all workers ended with exit code 0"
    return f"trained {steps}; the model is at {status.model.uri}" if status.model else f"done: {steps}"


def _left(seconds: int | None, age: float) -> float | None:
    return None if seconds is None else max(0.0, seconds - age)
