"""x"""


class KubeRayBackend:
    def __init__(self, t):
        pass
