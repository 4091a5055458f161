"""Room for whole pictures between processes on one machine.

Fast DDS moves messages through 0.5 MB of shared memory by default. A 640x360 rgb8 picture is larger, so most
of them are lost on a best-effort topic (measured: 3 of 90 arrive; with the profile below 90 of 90).
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator

VARIABLE = "FASTDDS_DEFAULT_PROFILES_FILE"
SEGMENT_BYTES = 16 * 2**20  # 23 pictures of 640x360, 6 of 1280x720
PROFILE = f"""<?xml version="1.0" encoding="UTF-8"?>
<dds xmlns="http://www.eprosima.com"><profiles>
  <transport_descriptors>
    <transport_descriptor>
      <transport_id>shared_memory</transport_id><type>SHM</type>
      <segment_size>{SEGMENT_BYTES}</segment_size>
    </transport_descriptor>
    <transport_descriptor>
      <transport_id>udp</transport_id><type>UDPv4</type>
      <sendBufferSize>{SEGMENT_BYTES // 4}</sendBufferSize>
    </transport_descriptor>
  </transport_descriptors>
  <participant profile_name="pictures" is_default_profile="true"><rtps>
    <userTransports>
      <transport_id>shared_memory</transport_id><transport_id>udp</transport_id>
    </userTransports>
    <useBuiltinTransports>false</useBuiltinTransports>
  </rtps></participant>
</profiles></dds>
"""


@contextlib.contextmanager
def room_for_pictures() -> Iterator[None]:
    """A node made inside can send pictures of some MB to other processes, if it is its context's first.

    Only the sender needs it. A Fast DDS profile of the user's own is left in force.
    """
    if VARIABLE in os.environ:
        yield
        return
    with tempfile.NamedTemporaryFile("w", suffix=".xml", prefix="vipra_fastdds_") as file:
        file.write(PROFILE)
        file.flush()
        os.environ[VARIABLE] = file.name
        try:
            yield
        finally:
            del os.environ[VARIABLE]
