"""`relay.py FROM TO PORT...`: whoever connects to a port at address FROM reaches the same port at TO."""

import asyncio
import sys


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def main(here: str, there: str, ports: list[str]) -> None:
    async def serve(port: int) -> None:
        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection(there, port)
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

        await (await asyncio.start_server(connect, here, port)).serve_forever()

    await asyncio.gather(*map(serve, map(int, sorted(set(ports)))))


asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
