"""One file = one task. The folder is the registry."""

if __name__ != "textrl_gym.envs":  # `import envs` at the repository's root would make a second copy of every module
    raise ImportError("import textrl_gym.envs, not envs: this folder is installed as textrl_gym.envs")
