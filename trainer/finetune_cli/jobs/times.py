"""Times for people: ages as kubectl writes them."""

from datetime import datetime


def duration(seconds: float) -> str:
    """Return a length of time, as exactly as people want it: 45s, 3m20s, 47m, 5h30m, 30h, 4d2h, 12d."""
    left = max(0, int(seconds))
    minutes, hours, days = left // 60, left // 3600, left // 86400
    if left < 120:
        return f"{left}s"
    if minutes < 10:
        return f"{minutes}m" + (f"{left % 60}s" if left % 60 else "")
    if hours < 3:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h" + (f"{minutes % 60}m" if minutes % 60 else "")
    if days < 2:
        return f"{hours}h"
    return f"{days}d" + (f"{hours % 24}h" if days < 8 and hours % 24 else "")


def age(time: str | None, now: datetime) -> str:
    """Return how long ago a time was; empty for none."""
    return duration((now - datetime.fromisoformat(time)).total_seconds()) if time else ""


def until(time: str | None, now: datetime) -> str:
    """Return how long it is until a time; empty for none, ``now`` for one that is past."""
    if not time:
        return ""
    seconds = (datetime.fromisoformat(time) - now).total_seconds()
    return duration(seconds) if seconds > 0 else "now"
