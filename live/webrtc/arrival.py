"""When a picture is whole: with its own last packet. Imported when aiortc is there."""

from aiortc.jitterbuffer import JitterBuffer, JitterFrame


class Prompt(JitterBuffer):
    """aiortc's own takes a picture for whole when the next one begins, a whole interval later. Both
    codecs mark the last packet of each (RFC 6184, section 5.1; RFC 7741, section 4.1)."""

    def _remove_frame(self, sequence_number: int) -> JitterFrame | None:
        packets = []
        for count in range(self.capacity):
            packet = self._packets[(self._origin + count) % self.capacity]
            if packet is None or (packets and packet.timestamp != packets[0].timestamp):
                break
            packets.append(packet)
            if packet.marker:
                self.remove(len(packets))
                data = b"".join(packet._data for packet in packets)
                return JitterFrame(data=data, timestamp=packets[0].timestamp)
        # of a sender that marks none
        return super()._remove_frame(sequence_number)
