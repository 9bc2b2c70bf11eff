"""Questions with an answer that is right: procedural worlds whose gold score is correctness. No torch.

- `passages`: facts of which some are doubtful, and questions about them
- `opinions`: questions about facts, whose user has a view of them
- `snippets`: numbered snippets and a question, to be answered with citations
- `quiz`: which of three things has a property, and sentences that help to tell
- `sums`: word problems with their working
- `problems`: those of reasoning-gym, with answers that are checked by rule
"""
