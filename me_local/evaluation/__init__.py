"""Does the ensemble answer better? Tasks with right answers, likelihoods of texts, and weights fitted to them.

Puts questions to an ensemble that is loaded. Knows nothing of how it makes its replies.
"""
