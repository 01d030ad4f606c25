"""Time methods: inside decoders and vision towers, behind a server, kernel by kernel."""
