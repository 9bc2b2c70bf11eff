"""One file = one algorithm. The folder is the registry."""

if __name__ != "textrl_gym.agents":  # `import agents` at the repository's root would make a second copy of every module
    raise ImportError("import textrl_gym.agents, not agents: this folder is installed as textrl_gym.agents")
