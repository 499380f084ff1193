// Pictures as the endpoint sees them: upright by their EXIF orientation. Browsers turn JPEGs themselves, but not all of
// them turn PNG and WebP, so of these the orientation is taken out and applied here. A picture without one stays as it is.

const MOST_BYTES = 64 * 2 ** 20; // the endpoint takes no more
const PNG = "\x89PNG\r\n\x1a\n";

/** The file, or an upright PNG of it; what cannot be read is given back as it is. */
export async function upright(file) {
  const start = text(new DataView(await file.slice(0, 12).arrayBuffer()), 0, 12);
  const walk = start.startsWith(PNG) ? pngChunks : /^RIFF....WEBP$/s.test(start) ? webpChunks : null;
  if (!walk || file.size > MOST_BYTES) return file;
  const view = new DataView(await file.arrayBuffer());
  for (const { kind, at, length } of walk(view)) {
    if (!["eXIf", "EXIF"].includes(kind)) continue;
    const orientation = orientationOf(view, at, length);
    return orientation === 1 ? file : turned(without(view, at - (kind === "eXIf" ? 4 : 8)), orientation, file);
  }
  return file;
}

function* pngChunks(view) {
  for (let at = 8; at + 12 <= view.byteLength; ) {
    const length = view.getUint32(at);
    yield { kind: text(view, at + 4, 4), at: at + 8, length };
    at += 12 + length;
  }
}

function* webpChunks(view) {
  for (let at = 12; at + 8 <= view.byteLength; ) {
    const length = view.getUint32(at + 4, true);
    yield { kind: text(view, at, 4), at: at + 8, length };
    at += 8 + length + (length % 2);
  }
}

/** EXIF's tag 274, in 1..8; 1 where it is missing or the block is damaged. */
function orientationOf(view, at, length) {
  try {
    const start = text(view, at, 6) === "Exif\0\0" ? 6 : 0;
    const block = new DataView(view.buffer, at + start, length - start);
    const little = text(block, 0, 2) === "II";
    const directory = block.getUint32(4, little);
    for (let entry = 0; entry < block.getUint16(directory, little); entry++) {
      const tag = directory + 2 + 12 * entry;
      if (block.getUint16(tag, little) !== 274 || block.getUint16(tag + 2, little) !== 3) continue;
      const value = block.getUint16(tag + 8, little);
      return value >= 1 && value <= 8 ? value : 1;
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return 1;
}

/** The file with its EXIF under a name that nobody reads, so that no browser turns it. */
function without(view, at) {
  const bytes = new Uint8Array(view.buffer.slice(0));
  bytes.set([..."prVt"].map((letter) => letter.charCodeAt(0)), at);
  return new Blob([bytes]);
}

async function turned(plain, orientation, file) {
  try {
    const picture = await createImageBitmap(plain);
    const { width, height } = picture;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = orientation > 4 ? [height, width] : [width, height];
    const context = canvas.getContext("2d");
    context.setTransform(...matrix(orientation, canvas.width, canvas.height));
    context.drawImage(picture, 0, 0);
    return await new Promise((resolve) => canvas.toBlob((blob) => resolve(blob ?? file)));
  } catch {
    return file; // too damaged to be shown
  }
}

/** From stored pixels to upright ones; `width` and `height` are those of the upright picture. */
function matrix(orientation, width, height) {
  return {
    2: [-1, 0, 0, 1, width, 0],
    3: [-1, 0, 0, -1, width, height],
    4: [1, 0, 0, -1, 0, height],
    5: [0, 1, 1, 0, 0, 0],
    6: [0, 1, -1, 0, width, 0],
    7: [0, -1, -1, 0, width, height],
    8: [0, -1, 1, 0, 0, height],
  }[orientation];
}

function text(view, at, length) {
  const bytes = new Uint8Array(view.buffer, view.byteOffset + at, Math.max(0, Math.min(length, view.byteLength - at)));
  return String.fromCharCode(...bytes);
}
