package index

import ("testing";"os";"context";"time";"runtime";"fmt"
 "github.com/hostflame/hostflame/internal/dwarf"
 "github.com/hostflame/hostflame/internal/elffile")

type fc struct{*os.File; n int64}
func (f fc) Size() int64 {return f.n}

func TestTry(t *testing.T) {
	f, err := os.Open(os.Getenv("BIN")); if err!=nil {t.Fatal(err)}
	fi,_ := f.Stat()
	for range 3 {
	start:=time.Now()
	m, err := elffile.Parse(fc{f,fi.Size()}); if err!=nil {t.Fatal(err)}
	secs,_ := m.Sections()
	z := &elffile.Inflater{Dir:"/tmp", Memory: 8<<20, Disk: 4<<30}
	d, err := dwarf.Open(m, secs, z); if err!=nil {t.Fatal(err)}
	out,_ := os.Create("/tmp/w/out.idx")
	sp,_ := elffile.TempFile("/tmp/w")
	st, err := Build(context.Background(), d, Identity{}, out, sp, 2)
	if err!=nil {t.Fatal(err)}
	var ms runtime.MemStats
	runtime.ReadMemStats(&ms)
	fmt.Printf("%+v %v sys %d MB heap %d\n", st, time.Since(start), ms.Sys>>20, ms.HeapSys>>20)
	}
}
