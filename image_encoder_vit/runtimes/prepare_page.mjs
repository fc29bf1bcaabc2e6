/**
 * Prepares pages for the encoder as the Python package does: fitted to the canvas with the resampling of PIL, bit for
 * bit, padded on the right sides in the right colour, and normalised. No dependencies; for browsers and Node.
 *
 * A page is { data, width, height, channels }: 8-bit pixels row by row, 1 to 4 channels (transformers.js' RawImage is
 * one, and so is a canvas' ImageData with channels: 4). Grey is spread to RGB, an alpha channel is dropped.
 */

const PRECISION_BITS = 22; // PIL's fixed point for weights of 8-bit images.

/** Cubic convolution with a = -0.5, and the triangle: [filter, its radius]. */
const FILTERS = { 2: [triangle, 1], 3: [cubic, 2] };

function triangle(x) {
  return Math.max(0, 1 - Math.abs(x));
}

function cubic(x) {
  const t = Math.abs(x);
  if (t < 1) return (1.5 * t - 2.5) * t * t + 1;
  return t < 2 ? -0.5 * (((t - 5) * t + 8) * t - 4) : 0;
}

/** Rounds halves to the even neighbour, as Python does. */
function roundToEven(x) {
  const below = Math.floor(x);
  if (x - below !== 0.5) return Math.round(x);
  return below % 2 === 0 ? below : below + 1;
}

/** For every output px of an axis, the first input px that counts and the weights of it and those after it. */
function weightsOfAxis(inputSize, outputSize, resample) {
  const [filter, radius] = FILTERS[resample];
  const scale = inputSize / outputSize;
  const stretch = Math.max(scale, 1); // Shrinking averages over as many px as become one.
  const support = radius * stretch;
  const axis = [];
  for (let output = 0; output < outputSize; output++) {
    const center = (output + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(inputSize, Math.trunc(center + support + 0.5));
    const weights = [];
    let total = 0;
    for (let input = first; input < end; input++) {
      const weight = filter((input - center + 0.5) * (1 / stretch));
      weights.push(weight);
      total += weight;
    }
    const fixed = weights.map((weight) => {
      const value = (total !== 0 ? weight / total : weight) * 2 ** PRECISION_BITS;
      return value < 0 ? Math.trunc(value - 0.5) : Math.trunc(value + 0.5);
    });
    axis.push([first, fixed]);
  }
  return axis;
}

function to8Bit(sum) {
  const value = Math.floor((sum + 2 ** (PRECISION_BITS - 1)) / 2 ** PRECISION_BITS);
  return Math.min(255, Math.max(0, value));
}

/** Resamples the rows (`step` 3 between px) or columns of RGB pixels. */
function resampleAxis(data, lines, lineStep, step, inputSize, outputSize, resample, output, outputLineStep, outputStep) {
  const axis = weightsOfAxis(inputSize, outputSize, resample);
  for (let line = 0; line < lines; line++) {
    for (let place = 0; place < outputSize; place++) {
      const [first, weights] = axis[place];
      for (let channel = 0; channel < 3; channel++) {
        let position = line * lineStep + first * step + channel;
        let sum = 0;
        for (const weight of weights) {
          sum += data[position] * weight;
          position += step;
        }
        output[line * outputLineStep + place * outputStep + channel] = to8Bit(sum);
      }
    }
  }
}

/** RGB pixels of [height, width] in another size; equal to PIL's `Image.resize`. */
export function resize(data, [height, width], [newHeight, newWidth], resample) {
  if (newWidth !== width) {
    const wider = new Uint8ClampedArray(height * newWidth * 3);
    resampleAxis(data, height, width * 3, 3, width, newWidth, resample, wider, newWidth * 3, 3);
    data = wider;
  }
  if (newHeight !== height) {
    const taller = new Uint8ClampedArray(newHeight * newWidth * 3);
    resampleAxis(data, newWidth, 3, newWidth * 3, height, newHeight, resample, taller, 3, newWidth * 3);
    data = taller;
  }
  return data;
}

function toRgb({ data, width, height, channels }) {
  if (!(width >= 1 && height >= 1) || data.length !== width * height * channels) {
    throw new Error(`A page of ${width} x ${height} px with ${channels} channels has not ${data.length} values.`);
  }
  if (channels === 3) return data;
  const rgb = new Uint8ClampedArray(width * height * 3);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      rgb[3 * pixel + channel] = data[channels * pixel + (channels === 4 ? channel : 0)];
    }
  }
  return rgb;
}

/** [height, width] of a page inside the canvas, and its [top, left] there. */
function place([height, width], settings) {
  const { height: canvasHeight, width: canvasWidth } = settings.canvas;
  if (!settings.keep_aspect_ratio) return [[canvasHeight, canvasWidth], [0, 0]];
  if (settings.padding_position === "bottom_right") {
    const scale = Math.min(canvasHeight / height, canvasWidth / width);
    return [[height, width].map((side) => Math.max(1, Math.trunc(side * scale + 0.5))), [0, 0]];
  }
  let size = [canvasHeight, canvasWidth];
  if (width / height > canvasWidth / canvasHeight) {
    size = [Math.max(1, roundToEven((height / width) * canvasWidth)), canvasWidth];
  } else if (width / height < canvasWidth / canvasHeight) {
    size = [canvasHeight, Math.max(1, roundToEven((width / height) * canvasHeight))];
  }
  return [size, [roundToEven((canvasHeight - size[0]) * 0.5), roundToEven((canvasWidth - size[1]) * 0.5)]];
}

/**
 * A page as the model takes it, by the `page_settings` of preprocessor_config.json.
 *
 * Returns { data: Float32Array, dims: [1, 3, height, width], originalSize: [height, width],
 * validRegion: [top, left, height, width] }, the last the part of the canvas that shows the page, in px.
 */
export function preparePage(page, settings) {
  const { canvas, image_mean: mean, image_std: std, rescale_factor: factor } = settings;
  const { fround } = Math; // The Python package computes in float32.
  const [size, [top, left]] = place([page.height, page.width], settings);
  const pixels = resize(toRgb(page), [page.height, page.width], size, settings.resample);
  const area = canvas.height * canvas.width;
  const data = new Float32Array(3 * area);
  for (let channel = 0; channel < 3; channel++) {
    const normalized = (value) =>
      fround(fround(value / fround(1 / factor)) - fround(mean[channel])) / fround(std[channel]);
    const values = Float32Array.from({ length: 256 }, (_, value) => normalized(value));
    const padding = settings.padding_color === "mean" ? 0 : values[settings.padding_color[channel]];
    data.fill(padding, channel * area, (channel + 1) * area);
    for (let row = 0; row < size[0]; row++) {
      const start = channel * area + (top + row) * canvas.width + left;
      for (let column = 0; column < size[1]; column++) {
        data[start + column] = values[pixels[3 * (row * size[1] + column) + channel]];
      }
    }
  }
  const dims = [1, 3, canvas.height, canvas.width];
  return { data, dims, originalSize: [page.height, page.width], validRegion: [top, left, ...size] };
}

/**
 * A processor for a pipeline of transformers.js: takes one RawImage or several, and gives { pixel_values } as a tensor
 * of the class `Tensor`, which is transformers.js' own.
 */
export function pageProcessor(settings, Tensor) {
  return async (images) => {
    const pages = [images].flat().map((image) => preparePage(image, settings));
    const [, ...dims] = pages[0].dims;
    const data = new Float32Array(pages.length * pages[0].data.length);
    pages.forEach((page, index) => data.set(page.data, index * page.data.length));
    return {
      pixel_values: new Tensor("float32", data, [pages.length, ...dims]),
      original_sizes: pages.map((page) => page.originalSize),
      valid_regions: pages.map((page) => page.validRegion),
    };
  };
}
