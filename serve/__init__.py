"""The online endpoint: the same actor, label sets and scoring as the batch job, behind HTTP."""
