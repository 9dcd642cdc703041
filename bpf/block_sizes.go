// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
)

const sysBlock = "/sys/block"

// Bounds of the maps of the block object. What does not fit is counted as DropNoSlot.
const (
	maxStates    = 1 << 20 // 32 bytes each
	spareStates  = 8 << 10
	maxQueues    = 4 << 10 // 64 bytes each
	spareQueues  = 256
	maxDevices   = 64 // HF_MAX_DEVICES
	minDevices   = 4
	spareDevices = 8
	maxCells     = 64 << 20 // bytes of cells, all CPUs together
)

// blockSizes are the numbers of entries of the maps.
type blockSizes struct {
	states  int // requests in flight
	queues  int // request queues, by id
	devices int // whole devices that have I/O
}

// blockSizesOfHost sizes the maps for the devices in dir (/sys/block), with room for
// those to come, and for as much again when a scheduler is switched on or off.
func blockSizesOfHost(dir string) (blockSizes, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return blockSizes{}, fmt.Errorf("list block devices: %w", err)
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return blockSizes{}, fmt.Errorf("count CPUs: %w", err)
	}
	states, devices := 0, 0
	for _, e := range entries {
		if n := tagsOf(filepath.Join(dir, e.Name())); n > 0 {
			states += n
			devices++
		}
	}
	// A queue id is also taken by devices without requests and by queues without a
	// disk (NVMe admin queues, SCSI hosts and other devices).
	return sizeBlock(states, 4*len(entries), devices, cpus), nil
}

func sizeBlock(states, queues, devices, cpus int) blockSizes {
	perDevice := int(unsafe.Sizeof(blockHfBlockIo{})) * len(operationNames) * cpus
	return blockSizes{
		states:  min(2*states+spareStates, maxStates),
		queues:  min(queues+spareQueues, maxQueues),
		devices: min(devices+spareDevices, maxDevices, max(maxCells/perDevice, minDevices)),
	}
}

// tagsOf returns how many places the device of a directory in /sys/block needs: for the
// requests that it can have in flight, and two for each hardware context (struct
// hf_block_places); 0 when it has no requests.
func tagsOf(dir string) int {
	contexts, err := os.ReadDir(filepath.Join(dir, "mq"))
	if err != nil {
		return 0
	}
	tags := readInt(filepath.Join(dir, "mq", "0", "nr_tags"))
	if b, err := os.ReadFile(filepath.Join(dir, "queue", "scheduler")); err == nil && !bytes.Contains(b, []byte("[none]")) {
		tags = readInt(filepath.Join(dir, "queue", "nr_requests"))
	}
	return len(contexts) * (max(tags, 0) + 2)
}

func readInt(path string) int {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0
	}
	return n
}

// blockDevice is a whole device in /sys/block.
type blockDevice struct {
	major, minor uint32 // 0:0 for a hidden path of NVMe multipath
	empty        bool   // without a size: a loop device without a file, a drive without a medium
}

// requestDevices lists the request-based devices in dir (/sys/block).
func requestDevices(dir string) (map[string]blockDevice, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list block devices: %w", err)
	}
	devices := make(map[string]blockDevice, len(entries))
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if _, err := os.Stat(filepath.Join(path, "mq")); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		d := blockDevice{empty: readInt(filepath.Join(path, "size")) == 0}
		if b, err := os.ReadFile(filepath.Join(path, "dev")); err == nil {
			fmt.Sscanf(string(b), "%d:%d", &d.major, &d.minor)
		}
		// sysfs has ! for the / in names such as cciss/c0d0.
		devices[strings.ReplaceAll(e.Name(), "!", "/")] = d
	}
	return devices, nil
}
