"""x"""


class SlurmBackend:
    def __init__(self, t):
        pass
