"""What a generation does, recorded: passes of the backbone, and tokens that a streamer receives."""

from transformers.generation.streamers import BaseStreamer


class BackboneCalls:
    """Records the shape (rows, columns of chunks) of each call of the backbone."""

    def __init__(self, model, monkeypatch):
        self.shapes, real = [], model.backbone.forward
        monkeypatch.setattr(model.backbone, "forward", lambda **args: self._record(args) or real(**args))

    def _record(self, args):
        self.shapes.append(tuple(args["inputs_embeds"].shape[:2]))

    def take(self):
        """The shapes since the last call of this."""
        shapes, self.shapes = self.shapes, []
        return shapes


class RecordingStreamer(BaseStreamer):
    """A streamer that records the tokens it receives."""

    def __init__(self):
        self.tokens, self.has_ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.has_ended = True
