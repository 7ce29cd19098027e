"""The image of docker/Dockerfile, built and run, and the services of docker/compose.yaml."""
