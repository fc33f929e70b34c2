"""Video to tokens: each frame is one tile, and a separator stands after each frame's tokens (NVILA's layout)."""


def video_text(frames: int, tokens_per_frame: int, video_token: str, separator: str) -> str:
    """The text that a video's placeholder becomes: for each frame its placeholder tokens, then the separator."""
    return (video_token * tokens_per_frame + separator) * frames
