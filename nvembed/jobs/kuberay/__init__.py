"""Jobs on Kubernetes, as RayJobs of KubeRay."""
