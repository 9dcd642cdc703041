// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// MappingEventType says what happened to a process.
type MappingEventType uint8

// The types of events.
const (
	MappingMap  = MappingEventType(iota) // it mapped executable memory, or made memory executable
	MappingExec                          // it executes another program; Comm is the new name. Its mappings follow
	MappingComm                          // a thread has a new name
	MappingFork                          // a thread was born: of the process itself where PID is Parent, else of a new process
	MappingExit                          // a thread ended
	MappingLost                          // Lost events, of any process, are missing before this one; 0: not known how many
	mappingEventTypes
)

var mappingEventNames = [mappingEventTypes]string{
	MappingMap:  "map",
	MappingExec: "exec",
	MappingComm: "comm",
	MappingFork: "fork",
	MappingExit: "exit",
	MappingLost: "lost",
}

func (t MappingEventType) String() string {
	if t < mappingEventTypes {
		return mappingEventNames[t]
	}
	return fmt.Sprintf("type %d", uint8(t))
}

// MappingEvent is one thing that happened to a process and its mappings. The ids are those
// of the pid namespace that the events were opened in.
type MappingEvent struct {
	Type     MappingEventType
	Time     uint64 // boot clock, ns
	PID, TID uint32
	// Of MappingFork, who called fork or clone; of MappingExit, the parent.
	Parent, ParentTID uint32
	Comm              Comm // of MappingExec and MappingComm

	// Of MappingMap. What the kernel merged with a neighbour is told as a whole. Unmapping
	// is not told.
	Start, End   uint64
	Offset       uint64 // of Start, in the file; 0 without one
	Major, Minor uint32
	Inode        uint64 // 0 without a file
	Generation   uint64 // tells the files apart that used the inode one after the other
	// Path is as the process sees it, with " (deleted)" behind where it has none any more;
	// without a file it is empty or a name in brackets. It is valid during the call only.
	Path []byte
	// PathUnknown: there is a file, but the kernel could not say its path.
	PathUnknown bool

	Lost uint64 // of MappingLost
}

// String is the event as the dumps show it.
func (e *MappingEvent) String() string {
	head := fmt.Sprintf("%d.%09d %s", e.Time/1e9, e.Time%1e9, e.Type)
	switch e.Type {
	case MappingMap:
		path := string(e.Path)
		if e.PathUnknown {
			path = "?"
		}
		return fmt.Sprintf("%s %d/%d %x-%x %08x %02x:%02x %d %s", head, e.PID, e.TID, e.Start, e.End, e.Offset, e.Major, e.Minor, e.Inode, path)
	case MappingExec, MappingComm:
		return fmt.Sprintf("%s %d/%d %q", head, e.PID, e.TID, e.Comm.String())
	case MappingFork, MappingExit:
		return fmt.Sprintf("%s %d/%d parent %d/%d", head, e.PID, e.TID, e.Parent, e.ParentTID)
	case MappingLost:
		return fmt.Sprintf("%s %d", head, e.Lost)
	}
	return head
}

// The layout of records: include/uapi/linux/perf_event.h, enum perf_event_type. Each ends
// with the sample_id fields, of which we ask for the time alone.
const (
	recordHeader = 8 // type, misc, size
	recordTime   = 8
)

// decode fills e from one record, its header and time included, and keeps its Path in it.
// known is false for a type of record that says nothing of mappings; ok is false where the
// record is not as the kernel would make it.
func (e *MappingEvent) decode(record []byte) (known, ok bool) {
	if len(record) < recordHeader+recordTime || len(record)%8 != 0 {
		return false, false
	}
	order := binary.NativeEndian
	kind, misc := order.Uint32(record), order.Uint16(record[4:])
	*e = MappingEvent{Time: order.Uint64(record[len(record)-recordTime:])}
	body := record[recordHeader : len(record)-recordTime]
	word := func(i int) uint32 { return order.Uint32(body[4*i:]) }
	long := func(i int) uint64 { return order.Uint64(body[8*i:]) }
	switch kind {
	case unix.PERF_RECORD_MMAP2:
		const path = 64 // pid, tid, addr, len, pgoff, maj, min, ino, ino_generation, prot, flags
		// The build id would lie where device and inode are; it is not asked for.
		if len(body) < path+8 || misc&unix.PERF_RECORD_MISC_MMAP_BUILD_ID != 0 {
			return true, false
		}
		e.Type, e.PID, e.TID = MappingMap, word(0), word(1)
		e.Start, e.End, e.Offset = long(1), long(1)+long(2), long(3)
		e.Major, e.Minor, e.Inode, e.Generation = word(8), word(9), long(5), long(6)
		return true, e.End > e.Start && e.setPath(body[path:])
	case unix.PERF_RECORD_COMM:
		const name = 8 // pid, tid
		if len(body) < name+8 {
			return true, false
		}
		e.Type, e.PID, e.TID = MappingComm, word(0), word(1)
		if misc&unix.PERF_RECORD_MISC_COMM_EXEC != 0 {
			e.Type = MappingExec
		}
		s, _, ended := bytes.Cut(body[name:], []byte{0})
		copy(e.Comm[:len(e.Comm)-1], s)
		return true, ended
	case unix.PERF_RECORD_FORK, unix.PERF_RECORD_EXIT:
		if len(body) < 24 { // pid, ppid, tid, ptid, time
			return true, false
		}
		e.Type = MappingFork
		if kind == unix.PERF_RECORD_EXIT {
			e.Type = MappingExit
		}
		e.PID, e.Parent, e.TID, e.ParentTID = word(0), word(1), word(2), word(3)
		return true, true
	case unix.PERF_RECORD_LOST:
		if len(body) < 16 { // id, lost
			return true, false
		}
		e.Type, e.Lost = MappingLost, long(1)
		return true, true
	}
	return false, true
}

// setPath takes the path as perf_event_mmap_event (kernel/events/core.c) makes it.
func (e *MappingEvent) setPath(padded []byte) (ok bool) {
	path, _, ok := bytes.Cut(padded, []byte{0})
	if e.Inode == 0 && e.Major == 0 && e.Minor == 0 {
		e.Offset = 0 // of anonymous memory it is the address
	}
	switch string(path) {
	case "//anon":
		path = nil
	case "//toolong", "//enomem":
		path, e.PathUnknown = nil, true
	}
	e.Path = path
	return ok
}
