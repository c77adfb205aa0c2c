"""Self-play: games as pure functions of arrays, policies' distributions, PPO and REINFORCE, pools of opponents.

Everything stands over a leading axis of games that are played in step.
"""
