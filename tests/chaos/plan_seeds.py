"""A seed on the pure plan: the rules of the state machine of ``test_plan_machine`` in a random order, without what makes hypothesis slow.

Hypothesis finds small counterexamples and looks where code is new; this plays thousands of long stories, the same ones each time.
"""

from random import Random
from typing import Any

from hypothesis.internal.conjecture.data import ConjectureData
from hypothesis.strategies import SearchStrategy

from tests.operator.test_plan_machine import FaultsInAnyOrder

STEPS = 40


def play(seed: int) -> None:
    """Play a seed to its end.

    Raises:
        AssertionError: a promise was broken; the note says what had happened until then, and how to replay it.
    """
    random = Random(seed)
    machine = FaultsInAnyOrder()
    story: list[str] = []
    try:
        machine.begin(nodes=random.randint(1, 3), trains=random.random() < 0.5)
        for _ in range(STEPS):
            rules = [
                rule for rule in machine.setup_state().rules if all(holds(machine) for holds in rule.preconditions)
            ]
            rule = random.choice(rules)
            arguments = draw(rule.arguments, random)
            story.append(f"{rule.function.__name__}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})")
            rule.function(machine, **arguments)
            machine.promises_are_kept()
        story.append("faults_stop()")
        machine.teardown()
    except Exception as error:
        error.add_note("\n".join([f"python -m tests.chaos --plan --seed {seed}", *story]))
        raise


def draw(arguments: dict[str, SearchStrategy[Any]], random: Random) -> dict[str, Any]:
    """Draw a rule's arguments. Hypothesis has no public way to draw by a random generator of one's own."""
    data = ConjectureData(prefix=(), random=random)
    return {name: data.draw(strategy) for name, strategy in arguments.items()}
