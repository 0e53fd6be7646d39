"""Schedule --prefix patient:L0: add L0 tokens after three steps in a row that fill the prefix."""

from prefix_distill import register_schedule


@register_schedule("patient")
class Patient:
    def __init__(self, arguments, limit):
        self.start = int(arguments[0])

    def length(self, step, state):
        return self.start * (1 + state.get("grown", 0))

    def observe(self, step, state, signal, reached):
        state["full"] = state.get("full", 0) + 1 if reached == 1 else 0
        if state["full"] == 3:
            state.update(full=0, window=self.length(step, state), grown=state.get("grown", 0) + 1)
            return f"after update {step + 1} the prefix is {self.length(step + 1, state)} tokens"
