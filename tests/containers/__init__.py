"""The image of docker/Dockerfile, really built and run, and the services of docker/compose.yaml."""
