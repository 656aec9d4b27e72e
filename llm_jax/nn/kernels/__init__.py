"""The same mathematics written the way a platform likes it; `core.platform.traits` chooses."""
