"""Data: prompts and preferences from files, folders and the Hub.

In reading order:
- `rows`: bad rows, rows that are read when they are asked for, and looking at every row once
- `text_files`: JSON lines and CSV, compressed or not, read where they lie
- `sources`: where rows come from: files, folders and the Hub
- `encoding`: text to tokens and back, of one text behind another
- `chat`: conversations: how data sets write them, system prompts and examples
- `prompts`: the published schemas of prompts, and their encoding within a token budget
- `prompt_streams`: which prompt each episode gets
- `turn_markers`: what a chat template writes between the turns of a conversation
- `labels`: labels of annotators: a file of them, and what several say together
- `preferences`: the published schemas of preferences
- `ranked`: preferences as token ids, in the form that reward models and DPO train on
- `trajectories`: complete episodes as data, in files and as rollouts
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "BadRow": "rows",
        "ChatSettings": "chat",
        "Item": "labels",
        "Label": "labels",
        "Preference": "preferences",
        "Preferences": "preferences",
        "PromptStreams": "prompt_streams",
        "RankedCompletions": "ranked",
        "encode_prompt": "prompts",
        "load_preferences": "preferences",
        "load_rows": "prompts",
        "read_labels": "labels",
        "read_preferences": "ranked",
        "Trajectory": "trajectories",
        "read_trajectories": "trajectories",
        "tldr_prompt": "prompts",
        "write_trajectories": "trajectories",
    },
)
